# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model folder, as a device uses it, and what is measured over tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from lorikit.server.errors import UnsupportedModelError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Sums over tokens that a language model was to foresee."""

    loss: float
    """Of the negative log probabilities, in nats."""
    correct: float
    """Tokens that it held for the most probable."""
    tokens: int

    def __add__(self, other: TokenLosses) -> TokenLosses:
        """The sums over both."""
        return TokenLosses(
            self.loss + other.loss, self.correct + other.correct, self.tokens + other.tokens
        )

    def metrics(self) -> dict[str, float]:
        """``loss`` and ``accuracy`` per token, and ``perplexity`` = exp(loss)."""
        count = max(self.tokens, 1)
        loss = self.loss / count
        return {
            "loss": loss,
            "accuracy": self.correct / count,
            "perplexity": math.exp(min(loss, 700.0)),
        }


def next_tokens(ids: Int64, mask: Int64) -> dict[str, npt.NDArray[np.generic]]:
    """Labels and weights of causal language modelling: each token is to foresee the next one.

    Args:
        ids: Token ids, [batch, length].
        mask: 1 for tokens, 0 for padding, [batch, length].

    Returns:
        ``labels`` int64 and ``weights`` float32, [batch, length]; a weight is 1 where a next token
        is there, else 0.
    """
    labels, weights = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    labels[:, :-1] = ids[:, 1:]
    weights[:, :-1] = mask[:, 1:]
    return {"labels": labels, "weights": weights}


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
