# SPDX-License-Identifier: Apache-2.0
"""Text to token ids; the one module that imports ``tokenizers``.

Loaded by name where text is read (see ``_data.py``), because a device that feeds token ids or
images does not need it.
"""

from __future__ import annotations

import tokenizers


class Tokenizer:
    """A package's ``tokenizer.json``, cutting at a fixed length."""

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
        self._tokenizer.enable_truncation(max_length)
        self.pad_id: int = padding["pad_id"] if padding else self._pad_token()
        self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def ids(self, text: str) -> list[int]:
        """Token ids of one text, special tokens included.

        One text a call on purpose: the library's batch calls start a thread per core, each with
        a heap of its own.
        """
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _pad_token(self) -> int:
        for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"):
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                return int(number)
        return 0
