# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back; the one module that imports ``tokenizers``.

Loaded by name where text is read (see ``_data/tokens.py``), because a device that feeds token ids
or images does not need it.

Which special tokens stand around a text is what the post-processor of ``tokenizer.json`` says.
The side on which it would pad is not looked at: examples are padded on the right, prompts of
generation on the left, and the mask hides padding either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import tokenizers

_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
_MASK_TOKENS = ("[MASK]", "<mask>")

_PART = 1 << 16
"""Characters of a long text that are tokenised at once; the library takes some 100 bytes each."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Characters that each token stands for; (0, 0) for special tokens."""
    leading_special: int
    """Special tokens in front of the text."""


class Tokenizer:
    """A package's ``tokenizer.json``, cutting at a fixed length.

    One text a call on purpose: the library's batch calls start a thread per core, each with a
    heap of its own.
    """

    def __init__(self, tokenizer_json: bytes, max_length: int) -> None:
        """Parse the file.

        Args:
            tokenizer_json: Content of a ``tokenizer.json``.
            max_length: Most tokens of one text, special tokens included.

        Raises:
            ValueError: Not a ``tokenizer.json``, or ``max_length`` leaves no room for a token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        special = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= special:
            raise ValueError(
                f"max_length {max_length} leaves no room beside {special} special tokens"
            )
        padding = self._tokenizer.padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self.pad_id: int = padding["pad_id"] if padding else self._first_known(_PAD_TOKENS, 0)
        self.mask_id: int = self._first_known(_MASK_TOKENS, -1)
        self.special_ids: frozenset[int] = frozenset(
            number
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self.vocabulary_size: int = self._vocabulary_size()

    def ids(self, text: str) -> list[int]:
        """Token ids of one text, special tokens included, cut at the length."""
        return self.encode(text).ids

    def encode(self, text: str) -> Encoded:
        """Like ``ids``, with the place of each token in the text."""
        self._tokenizer.enable_truncation(self._max_length)
        return _encoded(self._tokenizer.encode(text))

    def encode_whole(self, text: str) -> Encoded:
        """Like ``encode``, however long the text is."""
        self._tokenizer.no_truncation()
        return _encoded(self._tokenizer.encode(text))

    def pieces(self, text: str) -> Iterator[list[int]]:
        """Ids of the text in pieces of at most the length, special tokens around each."""
        self._tokenizer.enable_truncation(self._max_length)
        for part in _parts(text):
            encoding = self._tokenizer.encode(part)
            yield encoding.ids
            yield from (piece.ids for piece in encoding.overflowing)

    def stream(self, text: str) -> Iterator[list[int]]:
        """Ids of the whole text part by part, special tokens around the whole."""
        self._tokenizer.no_truncation()
        behind: list[int] = []
        for number, part in enumerate(_parts(text)):
            encoding = self._tokenizer.encode(part, add_special_tokens=number == 0)
            end = _end(encoding) if number == 0 else len(encoding.ids)
            behind.extend(encoding.ids[end:])
            yield encoding.ids[:end]
        yield behind

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text that is to be continued: without special tokens behind it."""
        self._tokenizer.no_truncation()
        encoding = self._tokenizer.encode(text)
        ids: list[int] = encoding.ids[: _end(encoding)]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text that ids stand for, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _first_known(self, tokens: Sequence[str], fallback: int) -> int:
        found = (self._tokenizer.token_to_id(token) for token in tokens)
        return next((int(number) for number in found if number is not None), fallback)

    def _vocabulary_size(self) -> int:
        """Largest id plus 1; added tokens may stand behind a gap."""
        added = max(self._tokenizer.get_added_tokens_decoder(), default=-1)
        return max(int(self._tokenizer.get_vocab_size(with_added_tokens=True)), added + 1)


def _encoded(encoding: tokenizers.Encoding) -> Encoded:
    return Encoded(encoding.ids, encoding.offsets, _leading(encoding))


def _leading(encoding: tokenizers.Encoding) -> int:
    """Special tokens in front of the text."""
    mask = encoding.special_tokens_mask
    return next((place for place, special in enumerate(mask) if not special), len(mask))


def _end(encoding: tokenizers.Encoding) -> int:
    """Where the special tokens behind the text begin."""
    mask = encoding.special_tokens_mask
    behind = next((place for place, special in enumerate(reversed(mask)) if not special), 0)
    return len(mask) - behind


def _parts(text: str) -> Iterator[str]:
    """Cut a long text behind a line's end, or else behind a space, where there is one."""
    start = 0
    while len(text) - start > _PART:
        cuts = (text.rfind(mark, start + 1, start + _PART) + 1 for mark in ("\n", " "))
        end = next((cut for cut in cuts if cut > start), start + _PART)
        yield text[start:end]
        start = end
    yield text[start:]
