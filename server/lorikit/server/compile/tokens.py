# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model folder, as a device uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from lorikit.server.errors import UnsupportedModelError

Int64 = npt.NDArray[np.int64]


class Tokenizer:
    """Reads ``tokenizer.json``; the same file travels to the devices."""

    def __init__(self, folder: Path) -> None:
        """Raises ``UnsupportedModelError`` when the folder has no ``tokenizer.json``."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedModelError(
                f"{folder} has no tokenizer.json; save the tokenizer with a fast tokenizer class"
            )
        self.file_bytes = path.read_bytes()
        self._tokenizer = tokenizers.Tokenizer.from_buffer(self.file_bytes)

    def batch(self, texts: Sequence[str], max_length: int) -> tuple[Int64, Int64]:
        """Token ids and attention mask, both [texts, longest], padded with 0."""
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return ids, mask
