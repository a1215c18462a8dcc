# SPDX-License-Identifier: Apache-2.0
"""FedIT: every device trains the same LoRA; the server averages A and B."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True, kw_only=True)
class FedITConfig:
    """What FedIT leaves to the user."""

    rank: int = 0
    """Rank of every device; 0 for the run's largest."""
    depth: int = 0
    """Trained layers from the output, the same on every device; 0 for all."""
    weighting: Weighting = "data"
    """``data`` (the paper) or ``uniform``."""
    scale: float = 2.0
    """LoRA scale s."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        if self.depth < 0:
            raise ValueError(f"depth must be at least 0, got {self.depth}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")


class FedIT:
    """Data-weighted mean of A and of B over devices that all have the same rank.

    ``Abar = sum p_k A_k``, ``Bbar = sum p_k B_k`` with ``p_k = n_k / sum n_j`` over the round's
    devices. ``Bbar Abar`` differs from the wanted ``sum p_k B_k A_k`` by the cross terms.

    Source:
        Zhang et al. 2024, "Towards Building the Federated GPT: Federated Instruction Tuning",
        https://arxiv.org/abs/2305.05644. The task head is averaged with the same weights; uniform
        weights and a common smaller depth are ours.
    """

    name = "fedit"

    def __init__(self, config: FedITConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        self.config = config or FedITConfig()

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The initial adapter, cut to the configured rank (B is 0, so the function is the same)."""
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
        rank = checked_rank(self.config.rank, space)
        return tuple(self._assignment(device.device_id, space, rank) for device in cohort)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """The global adapter."""
        return leading_ranks(adapter_of(state, space), space, assignment.ranks)

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The means of A, of B and of the head."""
        adapter = adapter_of(state, space)
        means = mean_over_holders(adapter, space, contributions, self.config.weighting)
        return replace(state, tensors=means)

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The means, or their best approximation of a smaller rank."""
        return best_of_rank(adapter_of(state, space), space, rank)

    def _assignment(self, device_id: str, space: AdapterSpace, rank: int) -> Assignment:
        layers = every_layer(space)
        return Assignment(
            device_id=device_id,
            ranks=same_ranks(space, rank),
            trained_layers=layers[space.layer_count - (self.config.depth or space.layer_count) :],
            kept_layers=layers,
            scale=self.config.scale,
        )
