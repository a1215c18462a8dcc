# SPDX-License-Identifier: Apache-2.0
"""Texts in which some tokens are hidden, to be guessed from the others.

Source: Devlin et al. 2019, "BERT", https://arxiv.org/abs/1810.04805, section 3.1: 15 % of the
tokens are chosen; of these 80 % become the mask token, 10 % any other token, and 10 % stay. What
differs: their number is fixed, round(0.15 n) and at least 1, so that every draw of an example has
as many labels; and they are chosen anew in every epoch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import Task
from lorikit.sdk._data.base import Dataset, Indices, by_token
from lorikit.sdk._data.rows import Row, text_column
from lorikit.sdk._data.tokens import TextReader
from lorikit.sdk._errors import DataError, PackageError
from lorikit.sdk.engines.base import Batch

SHARE = 0.15
"""Of an example's ordinary tokens, how many are to be guessed."""


class MaskedTexts(Dataset):
    """Tokenised texts; a long one is cut into several examples."""

    def __init__(self, rows: Iterable[Row], task: Task, reader: TextReader) -> None:
        """Read and tokenise all rows.

        Args:
            rows: Mappings with the task's text column, or texts.
            task: Column name.
            reader: The package's.

        Raises:
            DataError: A row has no text, or none but special tokens in it; the message names it.
            PackageError: The model has no token to mask with.
        """
        if reader.mask_id < 0:
            raise PackageError("the package's tokeniser has no mask token")
        special = reader.tokenizer.special_ids
        ordinary = array("q")
        self._tokens = reader.store()
        for number, row in enumerate(rows):
            for ids in reader.tokenizer.pieces(text_column(number, row, task)):
                count = sum(token not in special for token in ids)
                if not count:
                    raise DataError(f"row {number}: the text has no tokens that could be masked")
                ordinary.append(count)
                self._tokens.append(ids)
        vocabulary = np.arange(reader.tokenizer.vocabulary_size, dtype=self._tokens.ids.dtype)
        self._special = np.isin(vocabulary, list(special))
        self._substitutes = vocabulary[~self._special]
        self._counted: Indices = np.maximum(1, np.rint(SHARE * np.asarray(ordinary))).astype(
            np.int64
        )
        self._mask_id = reader.mask_id
        self.lengths = self._tokens.lengths
        self.max_length = reader.max_length

    def counted(self, draws: npt.ArrayLike) -> Indices:
        """Tokens to be guessed, by example."""
        return self._counted[np.asarray(draws, np.int64) % max(len(self), 1)]

    def batch(
        self, draws: npt.ArrayLike, weights: npt.ArrayLike = 1.0, *, seed: Sequence[int] = (0,)
    ) -> Batch:
        """See ``Dataset.batch``; labels (the tokens as they were) and weights, [batch, length]."""
        drawn = np.asarray(draws, np.int64)
        chosen = drawn % len(self)
        labels, mask = self._tokens.padded(chosen)
        ids = labels.copy()
        counts = np.zeros(labels.shape, np.bool_)
        for row, (draw, example) in enumerate(zip(drawn, chosen, strict=True)):
            rng = np.random.default_rng([*seed, int(draw)])
            places = np.flatnonzero(~self._special[labels[row]] & (mask[row] == 1))
            places = rng.choice(places, self._counted[example], replace=False, shuffle=False)
            counts[row, places] = True
            ids[row, places] = self._hidden(labels[row, places], rng)
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            labels=np.where(counts, labels, 0),
            weights=by_token(weights, counts),
        )

    def _hidden(self, ids: Indices, rng: np.random.Generator) -> Indices:
        """What the model sees of the tokens that it is to guess."""
        fate = rng.random(len(ids))
        others = rng.choice(self._substitutes, len(ids))
        return np.where(fate < 0.8, self._mask_id, np.where(fate < 0.9, others, ids))
