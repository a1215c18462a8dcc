# SPDX-License-Identifier: Apache-2.0
"""The device's own examples: rows in, padded batches out.

Rows are tokenised once, in one pass, and kept as flat integer arrays (two bytes a token for most
vocabularies); texts and tokeniser are dropped, so that they are gone before an engine is opened.
Messages of ``DataError`` name local values: they are for the app, never for the server.
"""

from __future__ import annotations

import importlib
import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import Task
from lorikit.sdk._errors import DataError, EngineUnavailableError, PackageError
from lorikit.sdk._heap import release_freed_memory
from lorikit.sdk.engines.base import Batch

if TYPE_CHECKING:
    from lorikit.sdk._tokenizer import Tokenizer

Indices = npt.NDArray[np.int64]
Row = Mapping[str, object] | tuple[str, object]
"""Columns by name, or a pair of text and label."""


class Dataset:
    """Tokenised examples with their classes."""

    def __init__(
        self,
        rows: Iterable[Row],
        tokenizer_json: bytes,
        task: Task,
        max_length: int,
        *,
        pad_multiple: int = 1,
    ) -> None:
        """Read and tokenise all rows, in their order.

        Args:
            rows: Mappings with the task's columns, or pairs (text, label); a label is a class name
                or its index. Read once, so a generator will do.
            tokenizer_json: The package's tokeniser.
            task: Column names and class names.
            max_length: Longest example in tokens; longer ones are cut.
            pad_multiple: Batches are padded to a multiple of it.

        Raises:
            DataError: A row lacks a column, its text is no text, or its label no class of the
                task; the message names the row (from 0) and the value.
            EngineUnavailableError: ``tokenizers`` is not installed.
            PackageError: The package's tokeniser cannot be read.
        """
        index = {name: number for number, name in enumerate(task.labels)}
        labels = array("q")

        def texts() -> Iterator[tuple[int, str]]:
            for number, row in enumerate(rows):
                text, label = _text_and_label(number, row, task)
                labels.append(_class_of(number, label, task, index))
                yield number, text

        self._tokens = _Tokens(texts(), tokenizer_json, max_length)
        self._labels: Indices = np.array(labels, dtype=np.int64)
        self._pad_multiple = pad_multiple
        self.max_length = max_length
        release_freed_memory()

    @classmethod
    def of_texts(
        cls, texts: Sequence[str], tokenizer_json: bytes, task: Task, max_length: int
    ) -> Dataset:
        """Texts to predict on; their labels are all 0 and mean nothing."""
        return cls(((text, 0) for text in texts), tokenizer_json, task, max_length)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Indices:
        """Class per example, [examples]."""
        return self._labels

    @property
    def lengths(self) -> Indices:
        """Tokens per example, [examples]."""
        return self._tokens.lengths

    def batch(self, indices: npt.ArrayLike, weights: npt.ArrayLike = 1.0) -> Batch:
        """The examples of that order as one batch, padded to the longest.

        Args:
            indices: Examples, [batch].
            weights: Weight of each example's loss, a number or [batch].
        """
        chosen = np.asarray(indices, dtype=np.int64)
        input_ids, attention_mask = self._tokens.padded(chosen, self._pad_multiple)
        return Batch(
            inputs={"input_ids": input_ids, "attention_mask": attention_mask},
            labels=self._labels[chosen],
            weights=np.broadcast_to(np.asarray(weights, np.float32), chosen.shape).copy(),
        )

    def batches(
        self, batch_size: int, indices: npt.ArrayLike | None = None
    ) -> Iterator[tuple[Indices, Batch]]:
        """Every example once, the longest first, with little padding.

        Args:
            batch_size: Examples in a batch; the last may have fewer.
            indices: Only these examples; None for all.

        Yields:
            The numbers of the examples, and the batch; every weight is 1 / number of examples.
        """
        every = np.arange(len(self)) if indices is None else np.asarray(indices, np.int64)
        for chosen in grouped_by_length(every, self.lengths[every], batch_size):
            yield chosen, self.batch(chosen, 1 / len(every))


def grouped_by_length(indices: Indices, lengths: Indices, group_size: int) -> Iterator[Indices]:
    """Cut examples into groups of similar length, the longest first.

    The longest come first because the runtime's arena then grows once and later groups fit in.
    Equal lengths keep their order, so the result depends on the arguments alone.

    Args:
        indices: Examples, [count].
        lengths: Tokens of each, [count].
        group_size: Most examples in a group.
    """
    order = indices[np.argsort(-lengths, kind="stable")]
    for start in range(0, len(order), group_size):
        yield order[start : start + group_size]


class _Tokens:
    """Token ids of many texts in one flat array."""

    def __init__(
        self, texts: Iterable[tuple[int, str]], tokenizer_json: bytes, max_length: int
    ) -> None:
        tokenizer = _tokenizer(tokenizer_json, max_length)
        flat = array("H" if tokenizer.vocabulary_size <= 1 << 16 else "I")
        ends = array("q", [0])
        for number, text in texts:
            ids = tokenizer.ids(text)
            if not ids:
                raise DataError(f"row {number}: the text {text[:40]!r} has no tokens")
            flat.extend(ids)
            ends.append(len(flat))
        self._flat: npt.NDArray[Any] = np.array(flat, dtype=flat.typecode)
        self._starts: Indices = np.array(ends, dtype=np.int64)
        self._pad_id = tokenizer.pad_id
        self.lengths: Indices = np.diff(self._starts)

    def padded(self, indices: Indices, multiple: int) -> tuple[Indices, Indices]:
        """Ids and mask, [batch, length]."""
        lengths = self.lengths[indices]
        width = -(-int(lengths.max(initial=1)) // multiple) * multiple
        ids = np.full((len(indices), width), self._pad_id, dtype=np.int64)
        for row, (start, length) in enumerate(zip(self._starts[indices], lengths, strict=True)):
            ids[row, :length] = self._flat[start : start + length]
        return ids, (np.arange(width) < lengths[:, None]).astype(np.int64)


def _tokenizer(tokenizer_json: bytes, max_length: int) -> Tokenizer:
    try:
        module = importlib.import_module("lorikit.sdk._tokenizer")
    except ImportError as error:
        raise EngineUnavailableError(
            'reading text needs tokenizers: pip install "lorikit[text]"'
        ) from error
    try:
        tokenizer: Tokenizer = module.Tokenizer(tokenizer_json, max_length)
    except ValueError as error:
        raise PackageError(f"the package's tokeniser cannot be used: {error}") from error
    return tokenizer


def _text_and_label(number: int, row: object, task: Task) -> tuple[str, object]:
    if isinstance(row, Mapping):
        missing = [c for c in (task.text_column, task.label_column) if c not in row]
        if missing:
            raise DataError(
                f"row {number} has no column {missing[0]!r}; its columns are {sorted(row)}"
            )
        text, label = row[task.text_column], row[task.label_column]
    elif isinstance(row, tuple | list) and len(row) == 2:
        text, label = row
    else:
        raise DataError(f"row {number} is neither a mapping nor a pair (text, label): {row!r:.80}")
    if not isinstance(text, str):
        raise DataError(f"row {number}: the text is of type {type(text).__name__}: {text!r:.80}")
    return text, label


def _class_of(number: int, label: object, task: Task, index: Mapping[str, int]) -> int:
    if isinstance(label, str) and label in index:
        return index[label]
    if not isinstance(label, str | bool):
        try:
            value = operator.index(label)  # type: ignore[arg-type]  # TypeError says it is no integer
        except TypeError:
            value = -1
        if 0 <= value < len(task.labels):
            return value
    known = ", ".join(task.labels[:8]) + (", ..." if len(task.labels) > 8 else "")
    raise DataError(
        f"row {number}: label {label!r:.80} is no class of the task; "
        f"classes are 0 to {len(task.labels) - 1}: {known}"
    )
