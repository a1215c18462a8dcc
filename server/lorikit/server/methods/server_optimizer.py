# SPDX-License-Identifier: Apache-2.0
"""A server optimiser around any method that averages factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.optimizers import adam_step, momentum_step
from lorikit.server.methods.base import (
    ADAPTER_ROLES,
    AdapterSpace,
    Assignment,
    Contribution,
    Method,
    Participant,
    State,
)
from lorikit.server.methods.head_start import HeadStart

_PREFIX = "server_optimizer."

_NEW_EACH_ROUND: Mapping[str, str] = {
    "fedex-lora": "that fit the change of the base only as they are",
    "flexlora": "by SVD each round",
    "flora": "each round and merges the old ones into the base",
    "frlora": "each round and merges the old ones into the base",
}
"""Methods for whose factors a change from round to round means nothing, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptimizerConfig:
    """How the server moves along the aggregated change."""

    name: Literal["momentum", "adam"] = "momentum"
    """``momentum``: FedAvgM; ``adam``: FedAdam."""
    learning_rate: float = 1.0
    """Server learning rate; above 0. FedAdam's is in units of the weights per round, so about
    0.001 to 0.03; FedAvgM with 1 takes the aggregated change as it is, plus momentum."""
    beta1: float = 0.9
    """Momentum; in [0, 1)."""
    beta2: float = 0.99
    """FedAdam: decay of the squares; in [0, 1)."""
    tau: float = 1e-3
    """FedAdam: degree of adaptivity; above 0."""
    roles: tuple[str, ...] = (*ADAPTER_ROLES, "head")
    """Roles of the tensors that the optimiser moves; others take the aggregate."""

    def __post_init__(self) -> None:
        if self.name not in ("momentum", "adam"):
            raise ValueError(f"server optimizer must be 'momentum' or 'adam', got {self.name!r}")
        for field in ("learning_rate", "tau"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field} must be above 0 and finite, got {value}")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must lie in [0, 1), got {getattr(self, field)}")


class ServerOptimizer:
    """Treats aggregate minus previous value as a gradient step and optimises along it.

    A tensor that did not change at all (no device held it) keeps its value and its momentum.
    Momentum lives in the state under names of its own, so a restarted server goes on from it.

    Source:
        FedAvgM: Hsu et al. 2019, https://arxiv.org/abs/1909.06335. FedAdam: Reddi et al. 2021,
        https://arxiv.org/abs/2003.00295. Both are stated for plain averaging; around HETLORA or
        FedRA the change is that of their weighted means.
    """

    def __init__(self, method: Method, config: ServerOptimizerConfig | None = None) -> None:
        """Wrap a method.

        Raises:
            ValueError: The method makes new factors each round, so a change means nothing; or it
                is a ``HeadStart``, which belongs outside.
        """
        if method.name in _NEW_EACH_ROUND:
            raise ValueError(
                f"{method.name} makes new factors {_NEW_EACH_ROUND[method.name]}, so momentum on "
                "factors has no meaning; use fedit, hetlora, legend or fedra, or no server "
                "optimizer"
            )
        if isinstance(method, HeadStart):
            raise ValueError(
                "the head start is a jump, not a step; wrap as HeadStart(ServerOptimizer(method))"
            )
        self.method = method
        self.config = config or ServerOptimizerConfig()

    @property
    def name(self) -> str:
        """Name of the wrapped method."""
        return self.method.name

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """State of the wrapped method; momentum comes with the first aggregate."""
        return self.method.start(space, initial)

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """What the wrapped method assigns."""
        return self.method.assign(_inner(state), space, round_number, cohort, rng)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """What the wrapped method sends."""
        return self.method.broadcast(_inner(state), space, assignment)

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The wrapped method's aggregate, reached by one optimiser step instead of a jump."""
        after = self.method.aggregate(_inner(state), space, contributions)
        tensors = dict(after.tensors)
        memory = {n: v for n, v in state.tensors.items() if n.startswith(_PREFIX)}
        for tensor in space.named(*self.config.roles):
            previous = state.tensors[tensor.name]
            change = after.tensors[tensor.name] - previous
            if change.any():
                step = self._step(tensor.name, change, memory)
                tensors[tensor.name] = previous + step
        return replace(after, tensors={**tensors, **memory})

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The wrapped method's adapter."""
        return self.method.global_adapter(_inner(state), space, rank)

    def _step(self, name: str, change: Float32, memory: Tensors) -> Float32:
        """The step for one tensor; its momentum in ``memory`` is replaced."""
        config = self.config
        first = f"{_PREFIX}first.{name}"
        m = memory.get(first, np.zeros_like(change))
        if config.name == "momentum":
            step, memory[first] = momentum_step(
                change, m, learning_rate=config.learning_rate, beta=config.beta1
            )
            return step
        second = f"{_PREFIX}second.{name}"
        v = memory.get(second, np.full_like(change, config.tau**2))
        step, memory[first], memory[second] = adam_step(
            change,
            m,
            v,
            learning_rate=config.learning_rate,
            beta1=config.beta1,
            beta2=config.beta2,
            tau=config.tau,
        )
        return step


def _inner(state: State) -> State:
    """The state as the wrapped method left it."""
    own = {n: v for n, v in state.tensors.items() if not n.startswith(_PREFIX)}
    return replace(state, tensors=own)
