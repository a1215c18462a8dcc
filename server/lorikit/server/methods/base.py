# SPDX-License-Identifier: Apache-2.0
"""What every federated method does: assign work, broadcast, aggregate.

A method is a pure object: it holds its frozen configuration and nothing else. What changes over
the rounds is a
``State``, which the server stores after each round, so that a restarted server goes on from it.
Methods know
nothing of gRPC, files, clocks or threads; randomness comes in as a generator seeded from (run,
round).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.plan import Operation
from lorikit.proto.tensors import Tensors

ADAPTER_ROLES = (
    "lora_A",
    "lora_B",
    "lora_magnitude",
    "ia3",
    "prompt",
    "adapter_down",
    "adapter_up",
    "bias",
    "norm",
)
"""Roles of what an adapter of any kind trains beside the head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpace:
    """The adapter tensors a base model offers, and the largest sizes in use."""

    tensors: tuple[AdapterTensor, ...]
    """Every adapter tensor of the full model; LoRA shapes hold the string ``rank``."""
    layer_count: int
    max_rank: int
    """Rank of the global adapter."""

    def named(self, *roles: str) -> tuple[AdapterTensor, ...]:
        """The tensors that have one of the roles."""
        return tuple(t for t in self.tensors if t.role in roles)

    def pairs(self) -> tuple[tuple[AdapterTensor, AdapterTensor], ...]:
        """LoRA pairs (A [rank, d_in], B [d_out, rank]) module by module."""
        b = {t.module: t for t in self.named("lora_B")}
        return tuple((a, b[a.module]) for a in self.named("lora_A"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """A device as methods see it."""

    device_id: str
    device_class: str = ""
    memory_limit_bytes: int
    max_rank: int
    """Largest rank whose plan fits, at full depth."""
    max_depth: int
    """Most trained layers from the output whose plan fits."""
    max_layers: int
    """Most layers the device can hold in a sub-model."""
    seconds_per_step: float
    """Estimated seconds of one optimiser step at full depth; above zero."""
    forward_fraction: float = 1 / 3
    """Share of that time the forward pass takes."""
    upload_seconds_per_rank: float = 0.0
    """Seconds to send one rank of one layer (LEGEND's beta); zero when unknown."""
    local: Mapping[str, float] = field(default_factory=dict)
    """What the method keeps per device between rounds, for example ``{"rank": 5}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a method wants one device to do in one round."""

    device_id: str
    ranks: Mapping[str, int]
    """LoRA rank per module for every module of the kept layers."""
    trained_layers: tuple[int, ...]
    """Layers whose adapters train, ascending."""
    kept_layers: tuple[int, ...]
    """Layers of the device's sub-model, ascending."""
    train_head: bool = True
    train_roles: tuple[str, ...] = (*ADAPTER_ROLES, "head")
    """Roles that train within the trained layers (``head`` only where ``train_head``)."""
    scale: float = 2.0
    """LoRA scale s of DeltaW = s B A."""
    gradient_operations: tuple[Operation, ...] = ()
    operations: tuple[Operation, ...] = ()
    train: bool = True
    """False: no training, operations only (for example ``class_sums``)."""
    precision: str = ""
    """Of the base that the device holds; the planner's choice, empty before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One accepted update."""

    device_id: str
    assignment: Assignment
    tensors: Tensors
    """Decoded to float32, checked finite and of the assigned shapes (or smaller, after pruning)."""
    scalars: Mapping[str, float]
    examples: int
    """Size of the device's data set (n_k)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a method remembers between rounds; stored after each round."""

    tensors: Tensors
    """Arrays by name; the global adapter under the adapter tensors' own names."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    devices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Per-device memory by device id; handed to ``assign`` as ``Participant.local``."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold."""


class Method(Protocol):
    """A federated method."""

    @property
    def name(self) -> str:
        """Name in configuration, reports and plans."""
        ...

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """State before the first round.

        Args:
            space: The model's adapter tensors.
            initial: Start values at ``space.max_rank``: A random, B zero, head as the model has it.
        """
        ...

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """Work for each device of the cohort, in its order."""
        ...

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """Adapter tensors for that assignment: every tensor of the kept layers and the head."""
        ...

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """State after a round.

        ``contributions`` comes in a fixed order (by device id) and is read once, one update in
        memory at a
        time. At least one contribution.
        """
        ...

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The adapter to evaluate and to export, at ``space.max_rank`` or cut to ``rank``."""
        ...
