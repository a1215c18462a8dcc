# SPDX-License-Identifier: Apache-2.0
"""A correction for differently quantised bases around any method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import (
    AdapterSpace,
    Assignment,
    Contribution,
    Method,
    Participant,
    State,
)
from lorikit.server.methods.base_correction import BaseCorrection
from lorikit.server.methods.base_delta import DELTA_ROLES, no_deltas
from lorikit.server.methods.base_drift import BaseDrift

_KEY = "base_correction"


class Corrected:
    """Gives every device what its base needs, and counts its update as if made with the exact base.

    What a base needs is decided by the precision in the assignment, which the planner fills in.
    Drift by precision and measured shares live in the state, so that a restarted server goes on
    from them. Wrap inside ``HeadStart`` and outside ``ServerOptimizer``.
    """

    def __init__(
        self, method: Method, correction: BaseCorrection, *, uses_deltas: bool = False
    ) -> None:
        """Wrap a method.

        Args:
            method: Any.
            correction: What it needs.
            uses_deltas: Whether the method itself changes the base by base deltas.
        """
        self.method = method
        self.correction = correction
        self._uses_deltas = uses_deltas

    @property
    def name(self) -> str:
        """Name of the wrapped method."""
        return self.method.name

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """State of the wrapped method.

        Raises:
            ValueError: The correction needs base deltas, which the package does not offer.
        """
        if self.correction.needs_deltas and not space.named(*DELTA_ROLES):
            raise ValueError(
                f"correction {self.correction.config.name!r} needs base deltas, which adapters of "
                "this kind do not have; set base_correction to none"
            )
        own = self._own(space)
        names = {tensor.name for tensor in own.tensors}
        return self.method.start(own, {n: v for n, v in initial.items() if n in names})

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """What the wrapped method assigns."""
        return self.method.assign(_inner(state), self._own(space), round_number, cohort, rng)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """What the wrapped method sends, as the device's base needs it."""
        adapter = self.method.broadcast(_inner(state), self._own(space), assignment)
        return self.correction.given(space, adapter, assignment, _memory(state).get("shares", {}))

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The wrapped method's aggregate of what the updates count as."""
        own, inner, shares = self._own(space), _inner(state), _memory(state).get("shares", {})
        drift = BaseDrift(self.correction, own)

        def counted() -> Iterator[Contribution]:
            for sent in contributions:
                adapter = self.method.broadcast(inner, own, sent.assignment)
                given = self.correction.given(own, adapter, sent.assignment, shares)
                made = self.correction.counted(own, adapter, sent)
                drift.add(adapter, given, sent, made)
                yield made

        after = self.method.aggregate(inner, own, counted())
        memory = {"shares": {**shares, **drift.shares()}, "drift": drift.rows()}
        return replace(after, extra={**after.extra, _KEY: memory})

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The wrapped method's adapter, for the exact base.

        Uncut, it has every tensor of the space: deltas are zero, they repair a base that is not
        quantised here.
        """
        adapter = self.method.global_adapter(_inner(state), self._own(space), rank)
        if self._uses_deltas or rank is not None or not space.named(*DELTA_ROLES):
            return adapter
        return {**adapter, **no_deltas(space, adapter)}

    def _own(self, space: AdapterSpace) -> AdapterSpace:
        """The space as the wrapped method knows it."""
        if self._uses_deltas:
            return space
        kept = tuple(t for t in space.tensors if t.role not in DELTA_ROLES)
        return replace(space, tensors=kept)


def drift_of(state: State) -> list[dict[str, Any]]:
    """Drift by precision in the round that ended with the state; empty without a correction."""
    return list(_memory(state).get("drift", ()))


def _memory(state: State) -> dict[str, Any]:
    return dict(state.extra.get(_KEY, {}))


def _inner(state: State) -> State:
    """The state as the wrapped method left it."""
    return replace(state, extra={k: v for k, v in state.extra.items() if k != _KEY})
