# SPDX-License-Identifier: Apache-2.0
"""Texts with a class each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import Task
from lorikit.sdk._data.base import Dataset, Indices
from lorikit.sdk._data.rows import Classes, Row, as_text, columns
from lorikit.sdk._data.tokens import TextReader
from lorikit.sdk._errors import DataError
from lorikit.sdk.engines.base import Batch


class ClassifiedTexts(Dataset):
    """Tokenised texts with their classes."""

    def __init__(self, rows: Iterable[Row], task: Task, reader: TextReader) -> None:
        """Read and tokenise all rows.

        Args:
            rows: Mappings with the task's columns, or pairs (text, label); a label is a class name
                or its number.
            task: Column names and class names.
            reader: The package's.

        Raises:
            DataError: A row lacks a column, its text is no text, or its label no class of the
                task; the message names the row (from 0) and the value.
        """
        classes = Classes(task)
        labels = array("q")
        self._tokens = reader.store()
        for number, row in enumerate(rows):
            text, label = columns(number, row, (task.text_column, task.label_column), "text")
            ids = reader.tokenizer.ids(as_text(number, text))
            if not ids:
                raise DataError(f"row {number}: the text {text!r:.42} has no tokens")
            labels.append(classes.number(number, label))
            self._tokens.append(ids)
        self._labels: Indices = np.array(labels, dtype=np.int64)
        self.lengths = self._tokens.lengths
        self.max_length = reader.max_length

    @classmethod
    def to_predict(cls, texts: Sequence[str], task: Task, reader: TextReader) -> ClassifiedTexts:
        """Texts to predict on; their labels are all 0 and mean nothing."""
        return cls(((text, 0) for text in texts), task, reader)

    @property
    def labels(self) -> Indices:
        """Class per example, [examples]."""
        return self._labels

    def counted(self, draws: npt.ArrayLike) -> Indices:
        """One label an example."""
        return np.ones(np.shape(draws), np.int64)

    def batch(
        self, draws: npt.ArrayLike, weights: npt.ArrayLike = 1.0, *, seed: Sequence[int] = (0,)
    ) -> Batch:
        """See ``Dataset.batch``; labels and weights are [batch]."""
        chosen = np.asarray(draws, np.int64) % len(self)
        ids, mask = self._tokens.padded(chosen)
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            labels=self._labels[chosen],
            weights=np.broadcast_to(np.asarray(weights, np.float32), chosen.shape).copy(),
        )
