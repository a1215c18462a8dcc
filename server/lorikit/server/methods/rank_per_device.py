# SPDX-License-Identifier: Apache-2.0
"""What methods share in which every device trains all layers at a rank of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import (
    adapter_of,
    every_layer,
    leading_ranks,
    same_ranks,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.device_ranks import DeviceRankConfig, RankRule, device_ranks
from lorikit.server.methods.facts import MethodFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPerDeviceConfig:
    """Which rank a device gets, and the scale of all."""

    rank_rule: RankRule = "budget"
    """See ``DeviceRankConfig.rule``."""
    min_rank: int = 2
    """Smallest rank of a device; at least 1."""
    reference_bytes: int = 0
    """See ``DeviceRankConfig.reference_bytes``."""
    budget_exponent: float = 1.0
    """See ``DeviceRankConfig.budget_exponent``."""
    law_exponent: float = 0.1
    """See ``DeviceRankConfig.law_exponent``."""
    scale: float = 2.0
    """LoRA scale s, the same whatever the rank."""

    def __post_init__(self) -> None:
        self.ranks()

    def ranks(self) -> DeviceRankConfig:
        """The options that say which rank a device gets."""
        return DeviceRankConfig(
            rule=self.rank_rule,
            min_rank=self.min_rank,
            reference_bytes=self.reference_bytes,
            budget_exponent=self.budget_exponent,
            law_exponent=self.law_exponent,
        )


Config = TypeVar("Config", bound=RankPerDeviceConfig)


class RankPerDevice(ABC, Generic[Config]):
    """Full depth at the device's own rank, cut from an adapter whose ranks are in order.

    A method says how updates become one adapter, and in which order its ranks stand.
    """

    name: str
    facts: ClassVar[MethodFacts]

    def __init__(self, config: Config) -> None:
        """Args are the method's options."""
        self.config = config

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The initial adapter at the largest rank."""
        self.facts.check(space)
        return State(tensors=dict(initial))

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """Full depth at the device's own rank."""
        ranks = device_ranks(self.config.ranks(), state, cohort, space.max_rank, rng)
        return tuple(self._assignment(d.device_id, space, ranks[d.device_id]) for d in cohort)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """The first r_k ranks of the global adapter."""
        return leading_ranks(adapter_of(state, space), space, assignment.ranks)

    @abstractmethod
    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """State after a round; see ``Method.aggregate``."""

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The global adapter, cut as a device of that rank would get it."""
        wanted = space.max_rank if rank is None else rank
        return leading_ranks(adapter_of(state, space), space, same_ranks(space, wanted))

    def _assignment(self, device_id: str, space: AdapterSpace, rank: int) -> Assignment:
        """What a device of that rank is asked to do."""
        layers = every_layer(space)
        return Assignment(
            device_id=device_id,
            ranks=same_ranks(space, rank),
            trained_layers=layers,
            kept_layers=layers,
            scale=self.config.scale,
        )
