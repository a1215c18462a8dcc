# SPDX-License-Identifier: Apache-2.0
"""The adapter an app uses: opened from the store, on or off line."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lorikit.proto.manifest import Manifest
from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import Dataset, Row
from lorikit.sdk._errors import PackageError
from lorikit.sdk._inference import log_probabilities, logits_of, measure
from lorikit.sdk._packages import read_adapter, read_manifest
from lorikit.sdk._store import LastAdapter, Store
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines.base import Engine

_BATCH_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    last: LastAdapter
    manifest: Manifest
    tokenizer: bytes
    adapter: Tensors
    engine: Engine


class LocalModel:
    """The store's last adapter. It has an engine of its own, so training goes on beside it."""

    def __init__(self, store: Store, *, engine: str | None, threads: int) -> None:
        """Nothing is opened before it is used."""
        self._store = store
        self._engine_name = engine
        self._threads = threads
        self._opened: _Opened | None = None
        self._lock = threading.Lock()

    def predict(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """The most probable label of each text, and its probability.

        Raises:
            PackageError: There is no adapter yet, or it does not lie in the store any more.
        """
        with self._lock:
            opened = self._open()
            task, labels = opened.manifest.task, opened.manifest.task.labels
            data = Dataset.of_texts(texts, opened.tokenizer, task, opened.last.max_length)
            logits = self._logits(opened, data)
        if not len(data):
            return []
        best = logits.argmax(axis=1)
        chances = np.exp(log_probabilities(logits)[np.arange(len(best)), best])
        return [(labels[c], float(p)) for c, p in zip(best, chances, strict=True)]

    def evaluate(self, rows: Iterable[Row]) -> dict[str, float]:
        """Accuracy (0 to 1), mean loss (nats) and number of the rows.

        Raises:
            PackageError: There is no adapter yet, or it does not lie in the store any more.
            DataError: A row does not fit the task.
        """
        with self._lock:
            opened = self._open()
            task, length = opened.manifest.task, opened.last.max_length
            data = Dataset(rows, opened.tokenizer, task, length)
            logits = self._logits(opened, data)
        return {**measure(logits, data.labels), "examples": float(len(data))}

    def close(self) -> None:
        """Give the engine's memory back; the next use opens it again."""
        with self._lock:
            self._close()

    def _open(self) -> _Opened:
        last = self._store.last_adapter()
        if last is None:
            raise PackageError("there is no adapter yet: take part in a run first")
        if self._opened is not None and self._opened.last == last:
            return self._opened
        self._close()
        blobs = self._store.blobs
        manifest = read_manifest(blobs, last.package)
        for blob in manifest.blobs():
            if blob.digest in last.blobs and not blobs.has(blob):
                raise PackageError(f"blob {blob.digest} is gone: connect and run again")
        if manifest.tokenizer is None:
            raise PackageError("the package has no tokeniser, so it cannot read text")
        self._opened = _Opened(
            last=last,
            manifest=manifest,
            tokenizer=blobs.read(manifest.tokenizer),
            adapter=read_adapter(blobs, last.adapter, manifest),
            engine=open_engine(self._engine_name, manifest, blobs.folder, threads=self._threads),
        )
        return self._opened

    def _logits(
        self, opened: _Opened, data: Dataset
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return logits_of(
            opened.engine, data, opened.adapter, opened.last.inputs, batch_size=_BATCH_SIZE
        )

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.engine.close()
            self._opened = None
