# SPDX-License-Identifier: Apache-2.0
"""Token ids of many texts in one flat array, two bytes each for most vocabularies."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import TextInput
from lorikit.sdk._data.base import Indices
from lorikit.sdk._errors import EngineUnavailableError, PackageError

if TYPE_CHECKING:
    from lorikit.sdk._tokenizer import Tokenizer


class TextReader:
    """How one package reads texts: its tokeniser, special tokens and the longest example."""

    def __init__(
        self,
        tokenizer_json: bytes,
        text: TextInput | None,
        max_length: int,
        *,
        pad_multiple: int = 1,
    ) -> None:
        """Open the tokeniser.

        Args:
            tokenizer_json: The package's tokeniser.
            text: What the manifest says of the model; None: what the tokeniser shows.
            max_length: Longest example in tokens; longer ones are cut.
            pad_multiple: Batches are padded to a multiple of it.

        Raises:
            EngineUnavailableError: ``tokenizers`` is not installed.
            PackageError: The tokeniser cannot be used.
        """
        bound = text.max_positions if text is not None else 0
        self.max_length = min(max_length, bound) if bound else max_length
        self.tokenizer = _open(tokenizer_json, self.max_length)
        self.pad_id = self.tokenizer.pad_id if text is None else text.pad_id
        self.mask_id = self.tokenizer.mask_id if text is None else text.mask_id
        self.end_ids = () if text is None else text.end_ids
        self.pad_multiple = pad_multiple

    def store(self) -> TokenArray:
        """An empty array that takes this tokeniser's ids."""
        return TokenArray(self.tokenizer.vocabulary_size, self.pad_id, self.pad_multiple)


class TokenArray:
    """Examples of ids, one after the other."""

    def __init__(self, vocabulary_size: int, pad_id: int, pad_multiple: int) -> None:
        """Args: largest id plus 1, id that fills up, and the multiple batches are padded to."""
        self._flat = array("H" if vocabulary_size <= 1 << 16 else "I")
        self._ends = array("q", [0])
        self._pad_id = pad_id
        self._pad_multiple = pad_multiple

    def append(self, ids: Iterable[int]) -> None:
        """Add an example."""
        self._flat.extend(ids)
        self._ends.append(len(self._flat))

    @property
    def ids(self) -> npt.NDArray[Any]:
        """All ids, [tokens], sharing the array's memory."""
        return np.asarray(memoryview(self._flat))

    @property
    def starts(self) -> Indices:
        """Where each example starts, and the end of the last, [examples + 1]."""
        return np.asarray(memoryview(self._ends))

    @property
    def lengths(self) -> Indices:
        """Tokens per example, [examples]."""
        return np.diff(self.starts)

    def padded(self, indices: Indices) -> tuple[Indices, Indices]:
        """Ids and mask, [batch, length]; the padding stands on the right."""
        return self.padded_like(self.ids, indices, self._pad_id), self.mask(indices)

    def padded_like(self, values: npt.NDArray[Any], indices: Indices, fill: int) -> Indices:
        """The examples' part of any array that has a number per token, [batch, length]."""
        starts = self.starts
        table = np.full((len(indices), self._width(indices)), fill, dtype=np.int64)
        for row, index in enumerate(indices):
            part = values[starts[index] : starts[index + 1]]
            table[row, : len(part)] = part
        return table

    def mask(self, indices: Indices) -> Indices:
        """1 for tokens, 0 for padding, [batch, length]."""
        lengths = self.lengths[indices]
        return (np.arange(self._width(indices)) < lengths[:, None]).astype(np.int64)

    def _width(self, indices: Indices) -> int:
        longest = int(self.lengths[indices].max(initial=1))
        return -(-longest // self._pad_multiple) * self._pad_multiple


def _open(tokenizer_json: bytes, max_length: int) -> Tokenizer:
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
