# SPDX-License-Identifier: Apache-2.0
"""The ``onnx-training`` engine: the runtime of onnxruntime-training 1.19.2.

Its build carries the gradient kernels (``LayerNormalizationGrad``, ``SoftmaxGrad_13``,
``GeluGrad``, ...) that stock onnxruntime lacks, so it runs the package's fused training graph;
where a package has none it runs the stock one.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from lorikit.proto.manifest import Manifest
from lorikit.sdk.engines.base import Engine

_TORCH_FRONT_END = "onnxruntime.training"


def _import_runtime() -> ModuleType:
    """Our module on the runtime, imported without the build's front end for torch.

    ``import onnxruntime`` of this build tries ``onnxruntime.training``, which imports torch and
    onnx where they are installed; all that is needed is an inference session. An entry of None
    makes that attempt end as if the front end were absent, which the build is prepared for.
    """
    if _TORCH_FRONT_END in sys.modules:
        return importlib.import_module("lorikit.sdk.engines._runtime")
    sys.modules[_TORCH_FRONT_END] = None  # type: ignore[assignment]  # None means "not importable"
    try:
        return importlib.import_module("lorikit.sdk.engines._runtime")
    finally:
        del sys.modules[_TORCH_FRONT_END]


_runtime = _import_runtime()


def open_package(manifest: Manifest, folder: Path, *, threads: int) -> Engine:
    """Open a package on onnxruntime-training; see ``engines.open_engine``."""
    engine: Engine = _runtime.open_package(
        manifest, folder, threads=threads, runtime="onnx-training"
    )
    return engine
