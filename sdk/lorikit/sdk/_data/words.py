# SPDX-License-Identifier: Apache-2.0
"""Words with a class each: names, parts of speech, and the like.

The first token of a word carries its label; the word's other tokens, special tokens and padding
carry none. Words are joined by one space and found again by their place in that text, so that
every tokeniser will do.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import Task
from lorikit.sdk._data.base import Dataset, Indices, by_token
from lorikit.sdk._data.rows import Classes, Row, columns
from lorikit.sdk._data.tokens import TextReader
from lorikit.sdk._errors import DataError
from lorikit.sdk.engines.base import Batch

OUTSIDE = "O"
"""Class of words in no span."""

_WORD = re.compile(r"\w+|[^\w\s]")
_UNCOUNTED = -1

Span = tuple[int, int]


class ClassifiedWords(Dataset):
    """Tokenised texts with a class per word."""

    def __init__(self, rows: Iterable[Row], task: Task, reader: TextReader) -> None:
        """Read and tokenise all rows.

        Args:
            rows: Mappings with the task's columns, or pairs: a list of words with a list of their
                classes, or a text with a list of spans (start, end, class) in characters. A span's
                class may be named without the ``B-`` and ``I-`` that the task's classes have;
                words in no span are ``O``.
            task: Column names and class names.
            reader: The package's. Words beyond its length are cut off and do not count.

        Raises:
            DataError: A row does not fit; the message names the row (from 0) and the value.
        """
        classes = Classes(task)
        self._tokens = reader.store()
        self._labels = array("i")
        for number, row in enumerate(rows):
            pair = columns(number, row, (task.text_column, task.label_column), "words")
            text, words, labels = _labelled(number, *pair, classes)
            self._append(number, text, words, labels, reader)
        self.lengths = self._tokens.lengths
        total = np.concatenate([[0], np.cumsum(np.asarray(self._labels) != _UNCOUNTED)])
        self._counted: Indices = np.diff(total[self._tokens.starts])
        self.max_length = reader.max_length

    @classmethod
    def to_predict(
        cls, examples: Sequence[Sequence[str]], task: Task, reader: TextReader
    ) -> ClassifiedWords:
        """Lists of words to predict on; their labels are all 0 and mean nothing.

        Raises:
            DataError: An example is no list of words, or longer than the model reads.
        """
        data = cls(
            ((words, [0] * (0 if isinstance(words, str) else len(words))) for words in examples),
            task,
            reader,
        )
        for number, (words, found) in enumerate(
            zip(examples, data.counted(np.arange(len(data))), strict=True)
        ):
            if len(words) != found:
                raise DataError(
                    f"row {number}: {len(words) - found} of {len(words)} words have no token "
                    f"within the {reader.max_length} that were planned for; give fewer at once"
                )
        return data

    def counted(self, draws: npt.ArrayLike) -> Indices:
        """Words that have a token, by example."""
        return self._counted[np.asarray(draws, np.int64) % max(len(self), 1)]

    def batch(
        self, draws: npt.ArrayLike, weights: npt.ArrayLike = 1.0, *, seed: Sequence[int] = (0,)
    ) -> Batch:
        """See ``Dataset.batch``; labels and weights are [batch, length]."""
        chosen = np.asarray(draws, np.int64) % len(self)
        ids, mask = self._tokens.padded(chosen)
        labels = self._tokens.padded_like(np.asarray(self._labels), chosen, _UNCOUNTED)
        counts = labels != _UNCOUNTED
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            labels=np.where(counts, labels, 0),
            weights=by_token(weights, counts),
        )

    def _append(
        self,
        number: int,
        text: str,
        words: Sequence[Span],
        labels: Sequence[int],
        reader: TextReader,
    ) -> None:
        encoded = reader.tokenizer.encode(text)
        by_place = array("i", [_UNCOUNTED]) * len(encoded.ids)
        for place, label in zip(_first_tokens(words, encoded.spans), labels, strict=False):
            by_place[place] = label
        if all(label == _UNCOUNTED for label in by_place):
            raise DataError(f"row {number}: none of its words has a token: {text[:40]!r}")
        self._tokens.append(encoded.ids)
        self._labels.extend(by_place)


def _first_tokens(words: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Place of each word's first token, as far as the tokens go."""
    places: list[int] = []
    place = 0
    for start, end in words:
        while place < len(spans) and (
            spans[place][1] <= start or spans[place][0] == spans[place][1]
        ):
            place += 1
        if place == len(spans):
            break
        if spans[place][0] < end:
            places.append(place)
            place += 1
    return places


def _labelled(
    number: int, source: object, labels: object, classes: Classes
) -> tuple[str, list[Span], list[int]]:
    """Text, place of each word, and number of its class."""
    if isinstance(source, str):
        words = [match.span() for match in _WORD.finditer(source)]
        return source, words, _by_spans(number, words, _spans(number, labels, source), classes)
    if not isinstance(source, Sequence) or not all(isinstance(w, str) and w for w in source):
        raise DataError(
            f"row {number}: words must be a list of texts that are not empty, got {source!r:.80}"
        )
    if isinstance(labels, str) or not isinstance(labels, Sequence | np.ndarray):
        raise DataError(f"row {number}: labels must be a list, one a word, got {labels!r:.80}")
    if len(source) != len(labels):
        raise DataError(f"row {number} has {len(source)} words, but {len(labels)} labels")
    return " ".join(source), _places(source), [classes.number(number, label) for label in labels]


def _places(words: Sequence[str]) -> list[Span]:
    """Where each word stands when they are joined by one space."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    return [(int(end) - len(word), int(end)) for word, end in zip(words, ends, strict=True)]


def _spans(number: int, value: object, text: str) -> list[tuple[int, int, object]]:
    spans: list[tuple[int, int, object]] = []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"row {number}: spans must be a list, got {value!r:.80}")
    for span in value:
        parts = (
            [span.get(name) for name in ("start", "end", "label")]
            if isinstance(span, Mapping)
            else span
        )
        if not isinstance(parts, Sequence) or len(parts) != 3:
            raise DataError(f"row {number}: a span is (start, end, class), got {span!r:.80}")
        start, end, label = parts
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
            raise DataError(
                f"row {number}: span {span!r:.80} does not lie in a text of {len(text)} characters"
            )
        spans.append((start, end, label))
    return spans


def _by_spans(
    number: int,
    words: Sequence[Span],
    spans: Sequence[tuple[int, int, object]],
    classes: Classes,
) -> list[int]:
    """Class of each word from the span it overlaps."""
    if OUTSIDE not in classes.names:
        raise DataError(
            f"row {number}: spans need a class {OUTSIDE!r} for the words between them; "
            "give lists of words and labels instead"
        )
    labels = [classes.number(number, OUTSIDE)] * len(words)
    for start, end, label in spans:
        first = True
        for index, word in enumerate(words):
            if word[0] < end and start < word[1]:
                labels[index] = _in_span(number, label, classes, first=first)
                first = False
    return labels


def _in_span(number: int, label: object, classes: Classes, *, first: bool) -> int:
    prefixed = f"{'B' if first else 'I'}-{label}"
    return classes.number(number, prefixed if prefixed in classes.names else label)
