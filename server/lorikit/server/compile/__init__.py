# SPDX-License-Identifier: Apache-2.0
"""Base model -> training graph -> package."""

from __future__ import annotations

from lorikit.server.compile.compiler import Compiler
from lorikit.server.compile.package import Package

__all__ = ["Compiler", "Package"]
