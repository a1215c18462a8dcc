# SPDX-License-Identifier: Apache-2.0
"""Texts to be continued: each token is the label of the one before it.

Texts make one stream of tokens, cut into examples of the full length, so that nothing is padded
and little is lost. Rows with a prompt and a response are an example each, and only the response
counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import Task
from lorikit.sdk._data.base import Dataset, Indices, by_token
from lorikit.sdk._data.rows import Row, as_text, text_column
from lorikit.sdk._data.tokens import TextReader
from lorikit.sdk._errors import DataError
from lorikit.sdk.engines.base import Batch

PROMPT, RESPONSE = "prompt", "response"
"""Columns of rows whose response alone is trained on."""


class CausalTexts(Dataset):
    """Tokenised texts with the place from which tokens count."""

    def __init__(self, rows: Iterable[Row], task: Task, reader: TextReader) -> None:
        """Read and tokenise all rows.

        A text ends with the model's end token, where the package names one. A prompt and a
        response are joined as they are; where both do not fit, the prompt loses its beginning,
        and then the response its end.

        Args:
            rows: Mappings with the task's text column, texts, or mappings with the columns
                ``prompt`` and ``response``.
            task: Column name.
            reader: The package's.

        Raises:
            DataError: A row has no text, or an empty response; the message names it.
        """
        self._tokens = reader.store()
        self._firsts = array("q")
        stream = array("q")
        for number, row in enumerate(rows):
            if isinstance(row, Mapping) and PROMPT in row and RESPONSE in row:
                self._append(*_pair(number, row, reader))
                continue
            for ids in _pieces(text_column(number, row, task), reader):
                stream.extend(ids)
                stream = self._cut(stream, reader.max_length)
        if len(stream) > 1:
            self._append(stream.tolist(), 1)
        self.lengths = self._tokens.lengths
        self._counted: Indices = self.lengths - np.asarray(self._firsts)
        self.max_length = reader.max_length

    def counted(self, draws: npt.ArrayLike) -> Indices:
        """Tokens that are to be guessed, by example."""
        return self._counted[np.asarray(draws, np.int64) % max(len(self), 1)]

    def batch(
        self, draws: npt.ArrayLike, weights: npt.ArrayLike = 1.0, *, seed: Sequence[int] = (0,)
    ) -> Batch:
        """See ``Dataset.batch``; labels (the next token) and weights are [batch, length]."""
        chosen = np.asarray(draws, np.int64) % len(self)
        ids, mask = self._tokens.padded(chosen)
        places = np.arange(1, ids.shape[1] + 1)
        firsts, lengths = np.asarray(self._firsts)[chosen], self.lengths[chosen]
        counts = (places >= firsts[:, None]) & (places < lengths[:, None])
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            labels=np.where(counts, np.roll(ids, -1, axis=1), 0),
            weights=by_token(weights, counts),
        )

    def _append(self, ids: Iterable[int], first: int) -> None:
        self._tokens.append(ids)
        self._firsts.append(first)

    def _cut(self, stream: array[int], length: int) -> array[int]:
        """Store all whole examples of the stream and return what is left."""
        whole = len(stream) // length * length
        for start in range(0, whole, length):
            self._append(stream[start : start + length].tolist(), 1)
        return stream[whole:]


def _pieces(text: str, reader: TextReader) -> Iterator[list[int]]:
    """The text's ids, part by part, with the end token last."""
    last = -1
    for ids in reader.tokenizer.stream(text):
        last = ids[-1] if ids else last
        yield ids
    if last not in reader.end_ids:
        yield list(reader.end_ids[:1])


def _pair(number: int, row: Mapping[str, object], reader: TextReader) -> tuple[list[int], int]:
    """Ids of a prompt with its response, and where the response begins."""
    prompt = as_text(number, row[PROMPT], PROMPT)
    response = as_text(number, row[RESPONSE], RESPONSE)
    encoded = reader.tokenizer.encode_whole(prompt + response)
    spans = encoded.spans
    first = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(spans))
    ids = list(encoded.ids)
    if not ids or ids[-1] not in reader.end_ids:
        ids.extend(reader.end_ids[:1])
    ids, first = _fitted(ids, max(first, 1), encoded.leading_special, reader.max_length)
    if first >= len(ids) or not response:
        raise DataError(f"row {number}: the response {response[:40]!r} has no tokens to train on")
    return ids, first


def _fitted(ids: list[int], first: int, special: int, length: int) -> tuple[list[int], int]:
    """The example within its length, and where its response begins then.

    Args:
        ids: Special tokens, prompt, response.
        first: Where the response begins.
        special: Special tokens in front, which stay.
        length: Most tokens; more than ``special``.
    """
    room = max(min(special + 1, length - 1), length - (len(ids) - first))
    dropped = max(0, first - room)
    kept = ids[:special] + ids[special + dropped :]
    return kept[:length], first - dropped
