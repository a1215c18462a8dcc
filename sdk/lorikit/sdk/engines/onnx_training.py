# SPDX-License-Identifier: Apache-2.0
"""The ``onnx-training`` engine: the runtime of onnxruntime-training 1.19.2.

Its build carries the gradient kernels (``LayerNormalizationGrad``, ``SoftmaxGrad_13``,
``GeluGrad``, ...) that stock onnxruntime lacks, so it runs the package's fused training graph;
where a package has none it runs the stock one. ``onnxruntime.training`` is never imported: that
package imports torch, and an inference session of this build is all that is needed.
"""

from __future__ import annotations

from pathlib import Path

from lorikit.proto.manifest import Manifest
from lorikit.sdk.engines._runtime import OnnxEngine


def open_package(manifest: Manifest, folder: Path, *, threads: int) -> OnnxEngine:
    """Open a package on onnxruntime-training; see ``engines.open_engine``."""
    return OnnxEngine(manifest, folder, threads=threads, runtime="onnx-training")
