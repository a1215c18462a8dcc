# SPDX-License-Identifier: Apache-2.0
"""Continues texts with a language model, token by token.

Keys and values of earlier tokens stay in arrays made once for the longest text that can come out,
so that a token costs the new part alone and memory is known from the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import CacheShape, Manifest, TextInput
from lorikit.proto.tensors import Array, Float32, Tensors
from lorikit.sdk._data import TextReader
from lorikit.sdk._errors import DataError, NonFiniteError, PackageError, UnsupportedPackageError
from lorikit.sdk.engines.base import Engine

Probabilities = npt.NDArray[np.float64]

_TOGETHER = 4
"""Prompts that are continued together: weights are read once for all of them."""
_STEP = 64
"""Tokens of a prompt that are read at once; bounds the memory of attention."""
_CONTEXT = 8
"""Last tokens of a prompt that a text is decoded with: some decoders treat a beginning apart."""
_UNFINISHED = "\ufffd"
"""What a decoder gives for a character whose bytes are not all there yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int = 0
    """Only so many of the most probable tokens are drawn from; 0 for all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach it are drawn from (nucleus sampling)."""
    seed: int = 0
    """Of the draws; each prompt draws for itself."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1, got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be texts that are not empty, got {self.stop!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a prompt was continued with."""

    text: str
    tokens: int
    """Tokens that were generated, those of a stop text and an end token included."""
    finish: str
    """``end`` (the model ended it), ``stop`` (a stop text came) or ``length``."""


def probabilities(logits: Float32, sampling: Sampling) -> Probabilities:
    """Chance of each token, [vocabulary]: temperature first, then top_k, then top_p.

    Of equal logits at a border the first ones stay. At temperature 0 the most probable token has
    all of it.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration",
    https://arxiv.org/abs/1904.09751, section 3.1 for top_p. The token that crosses it stays.
    """
    chances = np.zeros(len(logits))
    if sampling.temperature == 0:
        chances[logits.argmax()] = 1
        return chances
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order].astype(np.float64) / sampling.temperature
    kept = np.exp(scaled - scaled[0])
    kept /= kept.sum()
    count = int((np.cumsum(kept) - kept < sampling.top_p).sum())
    chances[order[:count]] = kept[:count] / kept[:count].sum()
    return chances


def choose(logits: Float32, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token, from its logits [vocabulary]; one draw of ``rng`` unless greedy."""
    chances = probabilities(logits, sampling)
    if sampling.temperature == 0:
        return int(chances.argmax())
    kept = np.flatnonzero(chances)
    place = int(np.searchsorted(np.cumsum(chances[kept]), rng.random(), side="right"))
    return int(kept[min(place, len(kept) - 1)])


class Reading:
    """Texts as the model has read them so far: its cache, and the logits of what follows."""

    def __init__(
        self,
        engine: Engine,
        adapter: Tensors,
        inputs: Mapping[str, float],
        *,
        shape: CacheShape,
        layers: Sequence[int],
        batch: int,
        capacity: int,
    ) -> None:
        """Make room; nothing is read yet.

        Args:
            engine: The opened package.
            adapter: Every adapter tensor.
            inputs: The plan's scalar inputs.
            shape: Of a layer's keys and values.
            layers: Layers of the package, by the names of their cache.
            batch: Texts that are read together.
            capacity: Most tokens of each, padding included.
        """
        self._engine = engine
        self._adapter = adapter
        self._inputs = inputs
        size = (capacity, batch, shape.heads, shape.width)
        names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        self._cache = {name: np.empty(size, np.float32) for name in names}
        self._mask = np.zeros((batch, capacity), np.int64)
        self._length = 0

    def read(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Float32:
        """Read on; return the logits of the token that follows, [batch, vocabulary].

        Args:
            ids: The tokens that come next, [batch, step].
            mask: 1 for tokens, 0 for padding, [batch, step]; only the first call has padding.

        Raises:
            NonFiniteError: A logit is NaN or infinite.
        """
        for start in range(0, ids.shape[1], _STEP):
            part = slice(start, start + _STEP)
            logits = self._read_part(ids[:, part], mask[:, part])
        if not np.isfinite(logits).all():
            raise NonFiniteError("logits are not finite; the adapter or the package is broken")
        return logits

    def _read_part(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Float32:
        past, now = self._length, self._length + ids.shape[1]
        self._mask[:, past:now] = mask
        positions = np.maximum(self._mask[:, :now].cumsum(axis=1)[:, past:] - 1, 0)
        tokens: dict[str, Array] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_mask": self._mask[:, :past],
            **{f"past.{name}": values[:past] for name, values in self._cache.items()},
        }
        found = self._engine.decode(self._adapter, tokens, self._inputs)
        for name, values in self._cache.items():
            values[past:now] = found.new[name]
        self._length = now
        return found.logits


class Writing:
    """One text as it grows."""

    def __init__(self, reader: TextReader, prompt: Sequence[int], sampling: Sampling) -> None:
        """Start after a prompt, given as ids."""
        self._tokenizer = reader.tokenizer
        self._end_ids = reader.end_ids
        self._stop = sampling.stop
        self._context = list(prompt[-_CONTEXT:])
        self._before = len(self._tokenizer.text(self._context))
        self._new: list[int] = []
        self._given = 0
        self._text = ""
        self.finish = ""
        """Why it ended; empty while it goes on."""

    def add(self, token: int) -> None:
        """Append a token, and notice whether it ends the text."""
        self._new.append(token)
        if token in self._end_ids:
            self.finish = "end"
            return
        self._text = self._tokenizer.text(self._context + self._new)[self._before :]
        found = [place for place in map(self._text.find, self._stop) if place >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.finish = "stop"

    def piece(self) -> str:
        """What is certain of the text and was not given yet."""
        certain = len(self._text) if self.finish else self._certain()
        piece = self._text[self._given : certain]
        self._given = max(self._given, certain)
        return piece

    def result(self) -> Generation:
        """The whole text."""
        return Generation(text=self._text, tokens=len(self._new), finish=self.finish or "length")

    def finish_at_length(self) -> None:
        """End the text because there is no room for more."""
        self.finish = self.finish or "length"

    def _certain(self) -> int:
        """Length of the text without an unfinished character or the beginning of a stop text."""
        text = self._text.rstrip(_UNFINISHED)
        longest = max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        return len(text) - longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """An opened package that can continue texts."""

    engine: Engine
    manifest: Manifest
    adapter: Tensors
    inputs: Mapping[str, float]
    reader: TextReader

    def write(
        self, prompts: Sequence[str], sampling: Sampling, *, first: int = 0
    ) -> Iterator[list[Writing]]:
        """Continue prompts together; yields the same texts after each token, until all have ended.

        Args:
            prompts: A few texts.
            sampling: How tokens are chosen.
            first: Number of the first prompt, in messages and for its draws.

        Raises:
            DataError: A prompt is no text, has no tokens, or fills the model; names it.
            UnsupportedPackageError: The package has no decoding graph.
            NonFiniteError: A logit is NaN or infinite.
        """
        shape, layers = _cache(self.manifest)
        bound = (self.manifest.text or TextInput()).max_positions
        ids = [_prompt_ids(n, p, self.reader, bound) for n, p in enumerate(prompts, first)]
        longest = max(map(len, ids))
        room = bound - min(map(len, ids)) if bound else sampling.max_new_tokens
        reading = Reading(
            self.engine,
            self.adapter,
            self.inputs,
            shape=shape,
            layers=layers,
            batch=len(ids),
            capacity=longest + min(room, sampling.max_new_tokens),
        )
        texts = [Writing(self.reader, each, sampling) for each in ids]
        draws = [np.random.default_rng([sampling.seed, first + n]) for n in range(len(ids))]
        logits = reading.read(*_padded(ids, self.reader.pad_id))
        for step in range(1, sampling.max_new_tokens + 1):
            tokens = np.full((len(ids), 1), self.reader.pad_id, np.int64)
            for row, text in enumerate(texts):
                if not text.finish:
                    tokens[row] = choose(logits[row], sampling, draws[row])
                    text.add(int(tokens[row, 0]))
                    if step == sampling.max_new_tokens or len(ids[row]) + step == bound:
                        text.finish_at_length()
            yield texts
            if all(text.finish for text in texts):
                return
            logits = reading.read(tokens, np.ones_like(tokens))

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Generation]:
        """Continue prompts, a few together; errors are those of ``write``."""
        results: list[Generation] = []
        for first in range(0, len(prompts), _TOGETHER):
            *_, texts = self.write(prompts[first : first + _TOGETHER], sampling, first=first)
            results.extend(text.result() for text in texts)
        return results

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Continue one prompt; yields its text piece by piece. Errors are those of ``write``."""
        for (text,) in self.write([prompt], sampling):
            if piece := text.piece():
                yield piece


def _cache(manifest: Manifest) -> tuple[CacheShape, tuple[int, ...]]:
    graph = next((graph for graph in manifest.graphs if graph.name == "decode"), None)
    if manifest.task.kind != "causal-language-modeling":
        raise PackageError(f"the package is for {manifest.task.kind}; use predict()")
    if graph is None or manifest.cache is None:
        raise UnsupportedPackageError(
            "the package has no decoding graph; compile it anew with this version of the server"
        )
    layers = [name.split(".")[1] for name in graph.inputs if name.startswith("past.")]
    return manifest.cache, tuple(sorted({int(layer) for layer in layers}))


def _prompt_ids(number: int, prompt: object, reader: TextReader, bound: int) -> list[int]:
    if not isinstance(prompt, str):
        raise DataError(f"prompt {number} is of type {type(prompt).__name__}: {prompt!r:.80}")
    ids = reader.tokenizer.prompt_ids(prompt)
    if not ids:
        raise DataError(f"prompt {number} has no tokens: {prompt!r:.80}")
    if bound and len(ids) >= bound:
        raise DataError(
            f"prompt {number} has {len(ids)} tokens, and the model reads {bound} in all; shorten it"
        )
    return ids


def _padded(
    ids: Sequence[Sequence[int]], pad_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and mask, [batch, longest], padded on the left."""
    longest = max(map(len, ids))
    table = np.full((len(ids), longest), pad_id, np.int64)
    mask = np.zeros_like(table)
    for row, each in enumerate(ids):
        table[row, longest - len(each) :] = each
        mask[row, longest - len(each) :] = 1
    return table, mask
