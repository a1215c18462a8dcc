# SPDX-License-Identifier: Apache-2.0
"""What methods share in which every device of a round gets the same work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import (
    WEIGHTINGS,
    Weighting,
    adapter_of,
    best_of_rank,
    checked_rank,
    every_layer,
    leading_ranks,
    mean_over_holders,
    same_ranks,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.facts import MethodFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class SameWorkConfig:
    """Rank and depth of all devices, and how they count."""

    rank: int = 0
    """Rank of every device; 0 for the run's largest."""
    depth: int = 0
    """Trained layers from the output, the same on every device; 0 for all."""
    weighting: Weighting = "data"
    """``data``: a device counts by its number of examples; ``uniform``: all count the same."""
    scale: float = 2.0
    """LoRA scale s."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        if self.depth < 0:
            raise ValueError(f"depth must be at least 0, got {self.depth}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")


Config = TypeVar("Config", bound=SameWorkConfig)


class SameWork(Generic[Config]):
    """One rank and one depth for all; every tensor is averaged over the devices that trained it.

    A method says which roles train in a round, or does more with the means.
    """

    name: str
    facts: ClassVar[MethodFacts]

    def __init__(self, config: Config) -> None:
        """Args are the method's options."""
        self.config = config

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The initial adapter, cut to the configured rank (B is 0, so the function is the same)."""
        self.facts.check(space)
        rank = checked_rank(self.config.rank, space)
        if self.config.depth > space.layer_count:
            raise ValueError(f"depth {self.config.depth} is above the {space.layer_count} layers")
        return State(tensors=leading_ranks(initial, space, same_ranks(space, rank)))

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """The same work for every device."""
        layers = every_layer(space)
        work = Assignment(
            device_id="",
            ranks=same_ranks(space, checked_rank(self.config.rank, space)),
            trained_layers=layers[space.layer_count - (self.config.depth or space.layer_count) :],
            kept_layers=layers,
            train_roles=self.train_roles(space, round_number),
            scale=self.config.scale,
        )
        return tuple(replace(work, device_id=device.device_id) for device in cohort)

    def train_roles(self, space: AdapterSpace, round_number: int) -> tuple[str, ...]:
        """Roles that train in a round."""
        return self.facts.usual_roles(round_number)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """The global adapter."""
        return leading_ranks(adapter_of(state, space), space, assignment.ranks)

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The mean of every tensor over the devices that trained it."""
        adapter = adapter_of(state, space)
        alike = self.facts.alike(contributions, adapter)
        means = mean_over_holders(adapter, space, alike, self.config.weighting)
        return replace(state, tensors=means)

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The means, or their best approximation of a smaller rank."""
        return best_of_rank(adapter_of(state, space), space, rank)
