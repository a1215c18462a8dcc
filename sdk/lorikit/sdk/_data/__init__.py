# SPDX-License-Identifier: Apache-2.0
"""The device's own examples: rows in, padded batches out; one module a kind of task.

Rows are read once, in one pass, and kept as flat arrays of small integers; texts, images and
tokeniser are dropped, so that they are gone before an engine is opened. Messages of ``DataError``
name local values: they are for the app, never for the server.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorikit.proto.manifest import Manifest
from lorikit.sdk._data.base import Dataset, Indices
from lorikit.sdk._data.causal import CausalTexts
from lorikit.sdk._data.images import ClassifiedImages, Image
from lorikit.sdk._data.masked import MaskedTexts
from lorikit.sdk._data.rows import Row
from lorikit.sdk._data.texts import ClassifiedTexts
from lorikit.sdk._data.tokens import TextReader
from lorikit.sdk._data.words import ClassifiedWords
from lorikit.sdk._errors import DataError, PackageError, UnsupportedPackageError
from lorikit.sdk._heap import release_freed_memory

__all__ = [
    "CausalTexts",
    "ClassifiedImages",
    "ClassifiedTexts",
    "ClassifiedWords",
    "Dataset",
    "Image",
    "Indices",
    "MaskedTexts",
    "Row",
    "TextReader",
    "read_dataset",
]


def read_dataset(
    rows: Iterable[Row], manifest: Manifest, tokenizer_json: bytes | None, max_length: int
) -> Dataset:
    """Read all rows for a package's task, in their order.

    Args:
        rows: Read once, so a generator will do. Their columns depend on the task:

            * sequence classification: a text and its class; a pair will do;
            * token classification: words and their classes, or a text and labelled spans;
            * masked language modelling: a text; a plain string will do;
            * causal language modelling: a text, a plain string, or ``prompt`` and ``response``;
            * image classification: an image and its class; a pair will do.
        manifest: Names the task, its columns and classes, and what the model reads.
        tokenizer_json: The package's tokeniser; None for models that read none.
        max_length: Longest example in tokens; longer ones are cut.

    Raises:
        DataError: A row does not fit the task; the message names the row (from 0) and the value.
        EngineUnavailableError: ``tokenizers`` is not installed.
        PackageError: The package cannot read such rows, or its tokeniser cannot be used.
    """
    if isinstance(rows, str):
        raise DataError(f"rows are one text, {rows!r:.42}; give a list of texts")
    try:
        return _read(rows, manifest, tokenizer_json, max_length)
    finally:
        release_freed_memory()


def _read(
    rows: Iterable[Row], manifest: Manifest, tokenizer_json: bytes | None, max_length: int
) -> Dataset:
    task = manifest.task
    if task.kind == "image-classification":
        if manifest.image is None:
            raise PackageError("the package does not say how its model reads images")
        return ClassifiedImages(rows, task, manifest.image)
    if tokenizer_json is None:
        raise PackageError("the package has no tokeniser, so it cannot read rows of text")
    reader = TextReader(tokenizer_json, manifest.text, max_length)
    if task.kind == "sequence-classification":
        return ClassifiedTexts(rows, task, reader)
    if task.kind == "token-classification":
        return ClassifiedWords(rows, task, reader)
    if task.kind == "masked-language-modeling":
        return MaskedTexts(rows, task, reader)
    if task.kind == "causal-language-modeling":
        return CausalTexts(rows, task, reader)
    raise UnsupportedPackageError(f"unknown kind of task {task.kind!r}; update the SDK")
