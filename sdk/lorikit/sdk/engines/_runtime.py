# SPDX-License-Identifier: Apache-2.0
"""Packages on ONNX Runtime; the one module that imports ``onnxruntime``.

Both ONNX engines are opened here: the stock and the training build of the runtime install the same
module and differ in kernels only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from lorikit.proto.manifest import Graph, Manifest
from lorikit.proto.tensors import Array
from lorikit.sdk._errors import (
    InvalidGraphError,
    OutOfMemoryError,
    PackageError,
    UnsupportedPackageError,
)
from lorikit.sdk.engines._onnx_file import check_places, read_model
from lorikit.sdk.engines._package import PackageEngine, Session

_STANDS_FOR = (1, 20)
"""Release of stock onnxruntime whose operators the training build 1.19.2 has."""

_OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "cannot allocate memory", "out of memory")
_UNSUPPORTED = (
    "is not a registered function/op",
    "no op registered for",
    "opset",
    "ir version",
    "ir_version",
)


def open_package(manifest: Manifest, folder: Path, *, threads: int, runtime: str) -> PackageEngine:
    """Open a package on the build of onnxruntime that is installed.

    Args:
        manifest: The package.
        folder: Flat folder that holds its blobs, each named by its digest.
        threads: Processor threads to use; at least 1.
        runtime: Which of the package's graphs to prefer: ``onnx`` or ``onnx-training``.

    Raises:
        PackageError: A blob is missing or has another size.
    """
    blobs = {blob.digest: blob.size for blob in manifest.weight_blobs}

    def open_graph(graph: Graph, path: Path) -> Session:
        _check_release(graph, runtime)
        check_places(read_model(path), blobs)
        return _OnnxSession(_open_session(path, threads, graph.prepack), graph.name)

    return PackageEngine(manifest, folder, runtime=runtime, open_graph=open_graph)


class _OnnxSession:
    """One graph in onnxruntime."""

    def __init__(self, session: Any, name: str) -> None:  # noqa: ANN401  # onnxruntime has no types
        self._session = session
        self._name = name
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        try:
            results: list[Array] = self._session.run(list(outputs), feeds)
        except Exception as error:  # the runtime's errors share no other base
            raise _translated(error, f"running graph {self._name!r}") from error
        return results


def _check_release(graph: Graph, runtime: str) -> None:
    """Refuse a graph that names a newer runtime than this one, before it is opened."""
    needed = _numbers(graph.minimum_runtime)
    if runtime == "onnx-training" and needed <= _STANDS_FOR:
        return
    if _numbers(onnxruntime.__version__) < needed:
        raise UnsupportedPackageError(
            f"graph {graph.name!r} needs onnxruntime {graph.minimum_runtime} or newer, here is "
            f"{onnxruntime.__version__}: pip install --upgrade onnxruntime"
        )


def _numbers(release: str) -> tuple[int, ...]:
    """The numbers of a release, without zeros at its end; empty for an empty text."""
    match = re.match(r"\d+(\.\d+)*", release)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _open_session(path: Path, threads: int, prepack: bool) -> Any:  # noqa: ANN401  # onnxruntime has no types
    options = _options(threads)
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no other base
        found = _translated(error, f"opening graph {path.name}")
        if type(found) is PackageError:
            found = InvalidGraphError(*found.args)
        raise found from error


def _options(threads: int) -> Any:  # noqa: ANN401  # onnxruntime has no types
    """Session options, chosen by measurement.

    Peak resident memory of the whole process, of it anonymous; MiniLM 22 M nf4, one example of 32
    tokens, 2 threads, onnxruntime 1.31, x86-64 Linux. As chosen: 118 MB, 60 anonymous.

    * Nodes in default order instead of file order: 125, 67 (int8 base: 152, 90 against 123, 61).
      File order is also what the compiler's memory plan assumes.
    * Memory pattern on: 136, 78 (int8: 184, 122). Graph optimisation basic: 284, 226, because
      it folds de-quantised weights into constants.
    * Arena off: 126 here, but 707 against 275 at 8 x 128 tokens, and slower: glibc keeps what is
      freed. Arena growing by what is asked only: the same resident, 70 MB less reserved there.
    * Planned reuse of buffers on: the same times, 2 to 10 MB more (one value in the place of
      another keeps chunks of the arena apart), and opening a graph of 5,700 nodes with symbolic
      shapes takes 10 s instead of 0.3 s. So every value is a buffer of its own, freed after its
      last use.
    * Spinning on: the same memory; steps 3 times slower where other processes want the cores.
    * Pre-packing: no difference for weights that are de-quantised, twice the memory for others;
      so it is on only for graphs whose memory was planned with it (``Graph.prepack``).
    * MALLOC_ARENA_MAX, MALLOC_TRIM_THRESHOLD_, PYTHONMALLOC: within 1 MB, so left alone.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _translated(error: Exception, action: str) -> Exception:
    """The SDK's error for one of the runtime's, which differ by text only."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _OUT_OF_MEMORY):
        return OutOfMemoryError(
            f"{action}: the runtime could not get the memory it needs: {text:.200}"
        )
    kind = type(error).__name__
    if kind == "NotImplemented" or any(sign in text.lower() for sign in _UNSUPPORTED):
        return UnsupportedPackageError(
            f"{action}: onnxruntime {onnxruntime.__version__} cannot run it: {text:.300}"
        )
    return PackageError(f"{action}: {kind}: {text:.300}")
