# SPDX-License-Identifier: Apache-2.0
"""What all engines share: one opened package, its graphs one at a time, its probe once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lorikit.proto.manifest import Graph, Manifest, ManifestError
from lorikit.proto.tensors import Array, Tensors
from lorikit.sdk._errors import (
    DamagedBlobError,
    InvalidGraphError,
    MissingBlobError,
    UnsupportedPackageError,
)
from lorikit.sdk._heap import release_freed_memory
from lorikit.sdk._pages import release_file_pages
from lorikit.sdk.engines._probe import check_probe, parse_probe
from lorikit.sdk.engines._signature import (
    DROPOUT_SEED,
    GRADIENT_SUFFIX,
    check_adapter,
    feeds,
    trained_tensors,
)
from lorikit.sdk.engines.base import Batch, Decoded, Evaluation, Gradients, Predictions


class Session(Protocol):
    """One opened graph."""

    inputs: tuple[str, ...]
    """Names of the inputs it really has."""
    outputs: tuple[str, ...]
    """Names of the outputs it really has."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        """The named outputs, in that order."""
        ...


OpenGraph = Callable[[Graph, Path], Session]
"""Opens a graph of the manifest; the path is its file, beside which the blobs lie."""


class PackageEngine:
    """One opened package on any runtime.

    Graphs are opened when first used, and only one is held at a time: a device either trains or
    predicts, and each session costs memory for its nodes and its arena. What the process mapped to
    get that far (imports, the registration of kernels, a graph's weights) is given back around it.
    """

    def __init__(
        self, manifest: Manifest, folder: Path, *, runtime: str, open_graph: OpenGraph
    ) -> None:
        """Note where the package is; nothing is loaded yet.

        Args:
            manifest: The package.
            folder: Flat folder that holds its blobs, each named by its digest.
            runtime: Which of the package's graphs to prefer, for example ``onnx-training``.
            open_graph: Opens a graph on the runtime.

        Raises:
            MissingBlobError: A blob is not in the folder.
            DamagedBlobError: A blob has another size.
        """
        self._manifest = manifest
        self._folder = folder
        self._runtime = runtime
        self._open_graph = open_graph
        self._trained = trained_tensors(manifest)
        self._probed = manifest.probe is None
        self._open: tuple[Graph, Session] | None = None
        _check_files(manifest, folder, runtime)

    def gradients(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Gradients:
        """Loss and gradients of one micro-batch; see ``Engine.gradients``.

        The first call also runs the package's probe.

        Raises:
            EngineDisagreesError: The probe gave other gradients than the reference.
        """
        self._probe_once()
        return self._gradients(adapter, batch, inputs)

    def loss(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Evaluation:
        """Loss of one micro-batch; see ``Engine.loss``."""
        names = ("loss", "correct")
        loss, correct = self._run(self._loss_graph(), names, adapter, batch, inputs)
        return Evaluation(loss=float(loss), correct=float(correct))

    def predict(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Predictions:
        """Logits and features; see ``Engine.predict``."""
        logits, features = self._run("predict", ("logits", "features"), adapter, batch, inputs)
        return Predictions(
            logits=np.asarray(logits, np.float32), features=np.asarray(features, np.float32)
        )

    def decode(
        self, adapter: Tensors, tokens: Mapping[str, Array], inputs: Mapping[str, float]
    ) -> Decoded:
        """Logits and the new part of the cache; see ``Engine.decode``."""
        graph, _ = self._session("decode")
        none = np.zeros(0, np.int64)
        batch = Batch(inputs=tokens, labels=none, weights=none.astype(np.float32))
        found = self._run("decode", graph.outputs, adapter, batch, inputs)
        results = dict(zip(graph.outputs, found, strict=True))
        return Decoded(
            logits=np.asarray(results.pop("logits"), np.float32),
            new={name.removeprefix("new."): value for name, value in results.items()},
        )

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
            gradients={
                name: np.asarray(gradient, np.float32)
                for name, gradient in zip(self._trained, gradients, strict=True)
            },
        )

    def _loss_graph(self) -> str:
        """The graph that gives the loss with the least memory."""
        has = any(graph.name == "evaluate" for graph in self._manifest.graphs)
        return "evaluate" if has else "train"

    def _probe_once(self) -> None:
        if self._probed or self._manifest.probe is None:
            return
        data = (self._folder / self._manifest.probe.digest).read_bytes()
        has_dropout = DROPOUT_SEED in self._manifest.graph("train", self._runtime).inputs
        check_probe(parse_probe(data), self._gradients, is_whole=has_dropout)
        self._probed = True

    def _run(
        self,
        name: str,
        outputs: tuple[str, ...],
        adapter: Tensors,
        batch: Batch,
        inputs: Mapping[str, float],
    ) -> Sequence[Array]:
        check_adapter(self._manifest, adapter)
        graph, session = self._session(name)
        return session.run(outputs, feeds(graph, adapter, batch, inputs))

    def _session(self, name: str) -> tuple[Graph, Session]:
        if self._open is not None and self._open[0].name == name:
            return self._open
        if self._open is not None:
            self.close()
        try:
            graph = self._manifest.graph(name, self._runtime)
        except ManifestError as error:
            raise UnsupportedPackageError(str(error)) from error
        release_file_pages(self._folder)
        session = self._open_graph(graph, self._folder / graph.blob.digest)
        _check_interface(graph, session)
        release_file_pages(self._folder)
        self._open = (graph, session)
        return self._open


def _check_files(manifest: Manifest, folder: Path, runtime: str) -> None:
    chosen = [graph.blob for graph in manifest.graphs if graph.runtime in (runtime, "onnx")]
    probe = [] if manifest.probe is None else [manifest.probe]
    for blob in (*manifest.weight_blobs, *chosen, *probe):
        path = folder / blob.digest
        if not path.is_file():
            raise MissingBlobError(f"blob {blob.digest} of the package is missing in {folder}")
        size = path.stat().st_size
        if size != blob.size:
            raise DamagedBlobError(
                f"blob {blob.digest} of the package has {size} bytes, not {blob.size}"
            )


def _check_interface(graph: Graph, session: Session) -> None:
    for what, listed, found in (
        ("inputs", graph.inputs, session.inputs),
        ("outputs", graph.outputs, session.outputs),
    ):
        differing = set(listed) ^ set(found)
        if differing:
            raise InvalidGraphError(
                f"graph {graph.name!r} and the manifest disagree on {what}: "
                + ", ".join(sorted(differing)[:5])
            )
