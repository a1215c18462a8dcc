# SPDX-License-Identifier: Apache-2.0
"""The adapter an app uses: opened from the store, on or off line."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorikit.proto.manifest import Manifest
from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import (
    ClassifiedImages,
    ClassifiedTexts,
    ClassifiedWords,
    Dataset,
    Row,
    TextReader,
    read_dataset,
)
from lorikit.sdk._errors import DataError, PackageError
from lorikit.sdk._generation import Author, Generation, Sampling
from lorikit.sdk._inference import LANGUAGE_MODELING, batch_size, best, labelled, measure
from lorikit.sdk._packages import read_adapter, read_manifest
from lorikit.sdk._store import LastAdapter, Store
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines.base import Engine


class Prediction(NamedTuple):
    """The most probable class of a text, an image or a word."""

    label: str
    probability: float
    """0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    last: LastAdapter
    manifest: Manifest
    tokenizer: bytes | None
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

    def predict(self, examples: Sequence[object]) -> list[Prediction] | list[list[Prediction]]:
        """The most probable class of each example, or of each of its words.

        Raises:
            PackageError: There is no adapter yet, or it does not lie in the store any more; or its
                model continues texts instead of naming classes.
            DataError: An example is not what the task reads; names it and says what would do.
        """
        _check_several(examples)
        with self._lock:
            opened = self._open()
            task = opened.manifest.task
            data = _to_predict(examples, opened)
            found: list[list[Prediction]] = [[] for _ in range(len(data))]
            for each in labelled(
                opened.engine,
                data,
                opened.adapter,
                opened.last.inputs,
                batch_size=batch_size(task),
            ):
                found[each.example] = [Prediction(task.labels[c], p) for c, p in best(each.logits)]
        return found if task.kind == "token-classification" else [each[0] for each in found]

    def evaluate(self, rows: Iterable[Row]) -> dict[str, float]:
        """Accuracy (0 to 1), mean loss (nats) and number of the rows; see ``measure``.

        Raises:
            PackageError: There is no adapter yet, or it does not lie in the store any more.
            DataError: A row does not fit the task.
        """
        with self._lock:
            opened = self._open()
            manifest, last = opened.manifest, opened.last
            data = read_dataset(rows, manifest, opened.tokenizer, last.max_length)
            metrics = measure(opened.engine, manifest.task, data, opened.adapter, last.inputs)
        return {**metrics, "examples": float(len(data))}

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Generation]:
        """Continue texts.

        Raises:
            PackageError: There is no adapter yet, or its model does not continue texts.
            DataError: A prompt cannot be continued; names it.
        """
        _check_several(prompts)
        if not prompts:
            return []
        with self._author() as author:
            return author.generate(prompts, sampling)

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Continue one text piece by piece; errors are those of ``generate``."""
        with self._author() as author:
            yield from author.stream(prompt, sampling)

    def close(self) -> None:
        """Give the engine's memory back; the next use opens it again."""
        with self._lock:
            self._close()

    @contextlib.contextmanager
    def _author(self) -> Iterator[Author]:
        """Borrow what is open: no lock is held while an app takes its time over a stream."""
        with self._lock:
            opened = self._open()
            self._opened = None
        try:
            yield Author(
                engine=opened.engine,
                manifest=opened.manifest,
                adapter=opened.adapter,
                inputs=opened.last.inputs,
                reader=_reader(opened),
            )
        finally:
            with self._lock:
                if self._opened is None:
                    self._opened = opened
                else:
                    opened.engine.close()

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
        self._opened = _Opened(
            last=last,
            manifest=manifest,
            tokenizer=None if manifest.tokenizer is None else blobs.read(manifest.tokenizer),
            adapter=read_adapter(blobs, last.adapter, manifest),
            engine=open_engine(self._engine_name, manifest, blobs.folder, threads=self._threads),
        )
        return self._opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.engine.close()
            self._opened = None


def _check_several(examples: object) -> None:
    if isinstance(examples, str):
        raise DataError(f"give a list of texts, not one text: {examples!r:.80}")


def _to_predict(examples: Sequence[object], opened: _Opened) -> Dataset:
    manifest = opened.manifest
    task = manifest.task
    if task.kind in LANGUAGE_MODELING:
        raise PackageError(
            f"the package is for {task.kind}, which has no classes to predict"
            + ("; use generate()" if task.kind.startswith("causal") else "")
        )
    if task.kind == "image-classification" and manifest.image is not None:
        return ClassifiedImages.to_predict(examples, task, manifest.image)
    reader = _reader(opened)
    if task.kind == "token-classification":
        return ClassifiedWords.to_predict(
            [_words(n, e) for n, e in enumerate(examples)], task, reader
        )
    return ClassifiedTexts.to_predict([_text(n, e) for n, e in enumerate(examples)], task, reader)


def _reader(opened: _Opened) -> TextReader:
    if opened.tokenizer is None:
        raise PackageError("the package has no tokeniser, so it cannot read text")
    return TextReader(opened.tokenizer, opened.manifest.text, opened.last.max_length)


def _text(number: int, example: object) -> str:
    if not isinstance(example, str):
        raise DataError(
            f"example {number}: the package classifies texts, got {type(example).__name__}: "
            f"{example!r:.80}"
        )
    return example


def _words(number: int, example: object) -> list[str]:
    if isinstance(example, str) or not isinstance(example, Sequence):
        raise DataError(
            f"example {number}: the package classifies words; give a list of them, for example "
            f"text.split(), got {example!r:.80}"
        )
    return list(example)
