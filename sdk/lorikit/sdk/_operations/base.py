# SPDX-License-Identifier: Apache-2.0
"""What every operation does, and what it may see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import Dataset
from lorikit.sdk.engines.base import Engine

Pair = tuple[str, str]
"""Names of a module's LoRA factors: A [rank, d_in] and B [d_out, rank]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The state of a task when its training is done."""

    received: Tensors
    """The adapter as the server sent it."""
    adapter: Tensors
    """The adapter now, every tensor of the manifest."""
    pairs: Sequence[Pair]
    engine: Engine
    data: Dataset
    classes: int
    inputs: Mapping[str, float]
    """The plan's scalar inputs."""
    seed: int
    check_cancelled: Callable[[], None]
    """Raises ``CancelledError`` once the app wants to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an operation leaves behind."""

    adapter: Tensors
    """The adapter from now on."""
    produced: Tensors = field(default_factory=dict)
    """Tensors that are no part of the adapter, to send with it."""


class GradientOperation(Protocol):
    """A term of the loss that the graph does not have; added once per optimiser step."""

    def check(self, adapter: Tensors, pairs: Sequence[Pair]) -> None:
        """Raise ``ValueError`` if the operation has no meaning for this adapter."""
        ...

    def term(self, adapter: Tensors, pairs: Sequence[Pair]) -> tuple[float, Tensors]:
        """Value of the term, and its gradient for the tensors it depends on."""
        ...


class FinalOperation(Protocol):
    """A step after training."""

    def check(self, adapter: Tensors, pairs: Sequence[Pair]) -> None:
        """Raise ``ValueError`` if the operation has no meaning for this adapter."""
        ...

    def produces(self) -> tuple[str, ...]:
        """Names of the tensors in ``Result.produced``."""
        ...

    def run(self, work: Work) -> Result:
        """Carry it out."""
        ...
