# SPDX-License-Identifier: Apache-2.0
"""The ``onnx`` engine: stock onnxruntime 1.20 or newer, on every platform it is built for."""

from __future__ import annotations

from pathlib import Path

from lorikit.proto.manifest import Manifest
from lorikit.sdk.engines._runtime import OnnxEngine


def open_package(manifest: Manifest, folder: Path, *, threads: int) -> OnnxEngine:
    """Open a package on stock onnxruntime; see ``engines.open_engine``."""
    return OnnxEngine(manifest, folder, threads=threads, runtime="onnx")
