# SPDX-License-Identifier: Apache-2.0
"""Frozen weights: how they are stored, and how a graph reads them."""

from lorikit.server.compile.base import (
    PRECISIONS,
    Base,
    Stored,
    codec_for,
    frozen_weights,
    store_base,
)
from lorikit.server.compile.kernels import KernelReport, KernelUse, read_weights
from lorikit.server.compile.runtimes import minimum_runtime

__all__ = [
    "PRECISIONS",
    "Base",
    "KernelReport",
    "KernelUse",
    "Stored",
    "codec_for",
    "frozen_weights",
    "minimum_runtime",
    "read_weights",
    "store_base",
]
