# SPDX-License-Identifier: Apache-2.0
"""Packages on ONNX Runtime; the one module that imports ``onnxruntime``.

Both ONNX engines are this class: the stock and the training build of the runtime install the same
module and differ in kernels only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from lorikit.proto.manifest import Graph, Manifest, ManifestError
from lorikit.proto.tensors import Tensors
from lorikit.sdk._errors import OutOfMemoryError, PackageError, UnsupportedPackageError
from lorikit.sdk._heap import release_freed_memory
from lorikit.sdk.engines._probe import check_probe, parse_probe
from lorikit.sdk.engines._signature import (
    GRADIENT_SUFFIX,
    check_adapter,
    feeds,
    trained_tensors,
)
from lorikit.sdk.engines.base import Batch, Gradients, Predictions

_OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "cannot allocate memory", "out of memory")
_UNSUPPORTED = ("is not a registered function/op", "opset", "ir version", "ir_version")


class OnnxEngine:
    """One opened package.

    Graphs are opened when first used, and only one is held at a time: a device either trains or
    predicts, and each session costs memory for its nodes and its arena.
    """

    def __init__(self, manifest: Manifest, folder: Path, *, threads: int, runtime: str) -> None:
        """Note where the package is; nothing is loaded yet.

        Args:
            manifest: The package.
            folder: Flat folder that holds its blobs, each named by its digest.
            threads: Processor threads to use; at least 1.
            runtime: Which of the package's graphs to prefer: ``onnx`` or ``onnx-training``.

        Raises:
            PackageError: A blob is missing or has another size.
        """
        self._manifest = manifest
        self._folder = folder
        self._threads = threads
        self._runtime = runtime
        self._trained = trained_tensors(manifest)
        self._probed = manifest.probe is None
        self._open: tuple[Graph, Any] | None = None
        _check_files(manifest, folder, runtime)

    def gradients(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Gradients:
        """Loss and gradients of one micro-batch; see ``Engine.gradients``.

        The first call also runs the package's probe.

        Raises:
            EngineDisagreesError: The probe gave other gradients than the reference.
        """
        self._probe_once()
        return self._gradients(adapter, batch, inputs)

    def predict(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Predictions:
        """Logits and features; see ``Engine.predict``."""
        logits, features = self._run("predict", ("logits", "features"), adapter, batch, inputs)
        return Predictions(logits=logits, features=features)

    def close(self) -> None:
        """Release the runtime's memory."""
        self._open = None
        release_freed_memory()

    def _gradients(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Gradients:
        names = ("loss", "correct", *(name + GRADIENT_SUFFIX for name in self._trained))
        loss, correct, *gradients = self._run("train", names, adapter, batch, inputs)
        return Gradients(
            loss=float(loss),
            correct=float(correct),
            gradients=dict(zip(self._trained, gradients, strict=True)),
        )

    def _probe_once(self) -> None:
        if self._probed or self._manifest.probe is None:
            return
        data = (self._folder / self._manifest.probe.digest).read_bytes()
        check_probe(parse_probe(data), self._gradients)
        self._probed = True

    def _run(
        self,
        name: str,
        outputs: tuple[str, ...],
        adapter: Tensors,
        batch: Batch,
        inputs: Mapping[str, float],
    ) -> list[Any]:
        check_adapter(self._manifest, adapter)
        graph, session = self._session(name)
        arrays = feeds(graph, adapter, batch, inputs)
        try:
            results: list[Any] = session.run(list(outputs), arrays)
        except Exception as error:  # the runtime's errors share no other base
            raise _translated(error, f"running graph {name!r}") from error
        return results

    def _session(self, name: str) -> tuple[Graph, Any]:
        if self._open is not None and self._open[0].name == name:
            return self._open
        if self._open is not None:
            self.close()
        try:
            graph = self._manifest.graph(name, self._runtime)
        except ManifestError as error:
            raise UnsupportedPackageError(str(error)) from error
        _check_release(graph)
        session = _open_session(self._folder / graph.blob.digest, self._threads, graph.prepack)
        _check_interface(graph, session)
        self._open = (graph, session)
        return self._open


def _check_release(graph: Graph) -> None:
    """Refuse a graph that names a newer runtime than this one, before it is opened."""
    if _numbers(onnxruntime.__version__) < _numbers(graph.minimum_runtime):
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
        raise _translated(error, f"opening graph {path.name}") from error


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
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _check_files(manifest: Manifest, folder: Path, runtime: str) -> None:
    chosen = [graph.blob for graph in manifest.graphs if graph.runtime in (runtime, "onnx")]
    probe = [] if manifest.probe is None else [manifest.probe]
    for blob in (*manifest.weight_blobs, *chosen, *probe):
        path = folder / blob.digest
        if not path.is_file():
            raise PackageError(f"blob {blob.digest} of the package is missing in {folder}")
        size = path.stat().st_size
        if size != blob.size:
            raise PackageError(
                f"blob {blob.digest} of the package has {size} bytes, not {blob.size}"
            )


def _check_interface(graph: Graph, session: Any) -> None:  # noqa: ANN401  # onnxruntime has no types
    for what, listed, found in (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    ):
        differing = set(listed) ^ {value.name for value in found}
        if differing:
            raise PackageError(
                f"graph {graph.name!r} and the manifest disagree on {what}: "
                + ", ".join(sorted(differing)[:5])
            )


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
