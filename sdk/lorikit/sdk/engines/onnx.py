# SPDX-License-Identifier: Apache-2.0
"""The ``onnx`` engine: stock onnxruntime 1.20 or newer, on every platform it is built for."""

from __future__ import annotations

from pathlib import Path

from lorikit.proto.manifest import Manifest
from lorikit.sdk.engines import _runtime
from lorikit.sdk.engines.base import Engine


def open_package(manifest: Manifest, folder: Path, *, threads: int) -> Engine:
    """Open a package on stock onnxruntime; see ``engines.open_engine``."""
    return _runtime.open_package(manifest, folder, threads=threads, runtime="onnx")
