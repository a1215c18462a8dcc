# SPDX-License-Identifier: Apache-2.0
"""Engines run training graphs; each is loaded by name.

Which ones are here is read from the installed distributions, without importing a runtime:
``onnxruntime`` and ``onnxruntime-training`` install the same module, so the module itself does not
tell them apart.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from lorikit.proto.device import EngineInfo
from lorikit.proto.manifest import Manifest
from lorikit.sdk._errors import EngineUnavailableError
from lorikit.sdk.engines.base import Engine, EngineType


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """How to find and load one engine."""

    module: str
    distributions: tuple[str, ...]
    oldest: tuple[int, int]
    """First release that runs our graphs; older ones are refused."""
    extra: str


_ENGINES = {
    "onnx-training": _Kind(
        module="lorikit.sdk.engines.onnx_training",
        distributions=("onnxruntime-training-cpu", "onnxruntime-training"),
        oldest=(1, 19),
        extra="onnx-training",
    ),
    "onnx": _Kind(
        module="lorikit.sdk.engines.onnx",
        distributions=("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
        oldest=(1, 20),
        extra="onnx",
    ),
    "torch": _Kind(
        module="lorikit.sdk.engines.torch",
        distributions=("torch",),
        oldest=(2, 9),
        extra="torch",
    ),
}
"""Engines by name, best first; ``torch`` comes last, since it weighs most on a CPU."""


def available_engines() -> tuple[EngineInfo, ...]:
    """Engines that can be opened here, best first, without importing their runtimes."""
    found = ((name, _installed_version(kind)) for name, kind in _ENGINES.items())
    return tuple(
        EngineInfo(name=name, version=version)
        for name, version in found
        if version is not None and _release(version) >= _ENGINES[name].oldest
    )


def open_engine(name: str | None, manifest: Manifest, folder: Path, *, threads: int) -> Engine:
    """Open a package for training and prediction.

    Args:
        name: An engine's name; None for the best that is installed.
        manifest: The package.
        folder: Flat folder that holds its blobs, each named by its digest.
        threads: Processor threads to use; at least 1.

    Raises:
        EngineUnavailableError: Unknown, not installed or too old; the message has the command
            that installs it.
        PackageError: A graph cannot be opened or is not what the manifest says.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if name is None:
        available = available_engines()
        name = available[0].name if available else "onnx"
    return _engine_type(name)(manifest, folder, threads=threads)


def _engine_type(name: str) -> EngineType:
    kind = _ENGINES.get(name)
    if kind is None:
        raise EngineUnavailableError(f"no engine {name!r}; there are: {', '.join(_ENGINES)}")
    command = f'pip install "lorikit[{kind.extra}]"'
    version = _installed_version(kind)
    if version is None:
        raise EngineUnavailableError(f"engine {name!r} is not installed: {command}")
    if _release(version) < kind.oldest:
        oldest = ".".join(map(str, kind.oldest))
        raise EngineUnavailableError(
            f"engine {name!r} needs {kind.distributions[0]} {oldest} or newer, found {version}: "
            f"{command}"
        )
    try:
        module = importlib.import_module(kind.module)
    except ImportError as error:
        raise EngineUnavailableError(
            f"engine {name!r} does not load ({error}): {command}"
        ) from error
    engine_type: EngineType = module.open_package
    return engine_type


def _installed_version(kind: _Kind) -> str | None:
    for distribution in kind.distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) for a version that has none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
