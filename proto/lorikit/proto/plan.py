# SPDX-License-Identifier: Apache-2.0
"""The plan: what one device is asked to do in one round, as typed data.

The device runs a plan with a small fixed vocabulary. ``OPERATIONS`` lists that vocabulary with
versions; an operation or a plan version that the device lacks is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorikit.proto.limits import MAX_BATCH, MAX_LENGTH, MAX_PLAN_STEPS

PLAN_VERSION = 1
"""Plan format that this version writes, and the highest it reads."""

WIRE_VERSION = 1
"""Version of wire schemes that this version writes and reads."""

WIRE_FEATURE = f"wire-{WIRE_VERSION}"
"""Name among a profile's codecs that says: this SDK knows wire schemes of that version."""

IMPORTANCES = ("second-moment", "first-order", "server")
"""What ``adaptive`` can weigh a tensor's squared error by."""

ADAPTIVE = "adaptive"
"""Wire scheme in which each tensor has its own codec."""

MAX_ROTATION_BLOCK = 1 << 16
"""Longest block of a rotation."""

MOST_DIRECTIONS = 1 << 24
"""Directions of a forward-only phase, at most: whole numbers up to it are exact in float32."""

Value = float | int | str | bool | tuple[float, ...] | tuple[int, ...] | tuple[str, ...]
"""Value of an operation's argument."""

OPERATIONS: Mapping[str, int] = {
    "tail_penalty": 1,
    "prune_tail": 1,
    "class_sums": 1,
}
"""Operations of this contract by name, with their current version.

``tail_penalty`` (gradient operation): adds the gradient of HETLORA's penalty. Arguments: ``weight``
(lambda), ``keep`` (gamma), ``min_rank``.
``prune_tail`` (after training): drops the tail ranks if their score fell. Arguments: ``keep``
(gamma), ``min_rank``.
``class_sums`` (after training, or alone): per-class sums of the head's input features and counts
over the local data, and with ``second_moments`` the sum of their outer products. Arguments:
``max_examples`` (0 for all), ``batch_size``, ``second_moments``.
"""


class PlanError(ValueError):
    """A plan breaks one of its rules; the message names the field and the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One step of the device's vocabulary."""

    name: str
    version: int = 1
    arguments: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """How the optimiser moves the trained tensors."""

    name: str = "adamw"
    """``adamw`` (Loshchilov & Hutter 2019, decoupled decay), ``sgd``, or ``mezo`` (Malladi et al.
    2023), which runs forward passes only."""
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    """SGD only."""
    clip_norm: float = 0.0
    """Largest joint l2 norm of a step's gradient; zero means no clipping."""
    schedule: str = "constant"
    """``constant``, ``linear`` (to zero over the phase) or ``cosine``."""
    warmup_steps: int = 0
    state_bits: int = 32
    """Bits of each number that AdamW or SGD remembers: 32, or 8 (Dettmers et al. 2022)."""
    perturbation: float = 1e-3
    """MeZO only: how far the two forward passes stand from the adapter, in units of its values."""
    directions: int = 1
    """MeZO only: random directions that a step averages, two forward passes each."""
    seeds: int = 0
    """MeZO only: size of the pool of directions that all steps, and all devices with the phase's
    seed, draw from (FedKSeed); 0 for a direction of its own each time."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd", "mezo"):
            raise PlanError(f"optimizer.name must be adamw, sgd or mezo, got {self.name!r}")
        if self.state_bits not in (8, 32):
            raise PlanError(f"optimizer.state_bits must be 8 or 32, got {self.state_bits}")
        self._check_forward_only()
        if self.schedule not in ("constant", "linear", "cosine"):
            raise PlanError(f"optimizer.schedule is unknown: {self.schedule!r}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise PlanError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise PlanError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "clip_norm", "warmup_steps"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise PlanError(f"optimizer.{name} must be at least 0, got {value}")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise PlanError(f"optimizer.epsilon must be positive, got {self.epsilon}")

    def _check_forward_only(self) -> None:
        if not (self.perturbation > 0 and math.isfinite(self.perturbation)):
            raise PlanError(f"optimizer.perturbation must be positive, got {self.perturbation}")
        if self.directions < 1 or self.seeds < 0:
            raise PlanError(
                "optimizer.directions must be at least 1 and optimizer.seeds at least 0, "
                f"got {self.directions} and {self.seeds}"
            )
        if self.name != "mezo":
            return
        for name in ("momentum", "weight_decay", "clip_norm"):
            if getattr(self, name):
                raise PlanError(f"optimizer mezo has no {name}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with one set of trained tensors and one optimiser."""

    name: str = "train"
    train: tuple[str, ...]
    """Names of the tensors that move."""
    steps: int
    """Optimiser steps; at least 1."""
    batch_size: int
    """Examples per optimiser step; at least 1."""
    micro_batch: int
    """Examples per run of the graph; 1 to ``batch_size``."""
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Learning-rate factor by tensor role (``lora_A``, ``lora_B``, ``head``); 1 where absent."""
    gradient_operations: tuple[Operation, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.train:
            raise PlanError(f"phase {self.name!r} trains nothing")
        if self.steps < 1:
            raise PlanError(f"phase {self.name!r}: steps must be at least 1, got {self.steps}")
        for name, most in (("steps", MAX_PLAN_STEPS), ("batch_size", MAX_BATCH)):
            if getattr(self, name) > most:
                raise PlanError(
                    f"phase {self.name!r}: {name} must be at most {most}, got {getattr(self, name)}"
                )
        if not 1 <= self.micro_batch <= self.batch_size:
            raise PlanError(
                f"phase {self.name!r}: micro_batch must lie in 1..{self.batch_size} (batch_size), "
                f"got {self.micro_batch}"
            )
        directions = self.optimizer.seeds or self.steps * self.optimizer.directions
        if self.optimizer.name == "mezo" and directions > MOST_DIRECTIONS:
            raise PlanError(
                f"phase {self.name!r}: mezo has at most {MOST_DIRECTIONS} directions, "
                f"got {directions}"
            )
        for role, factor in self.learning_rate_factors.items():
            if not (factor >= 0 and math.isfinite(factor)):
                raise PlanError(
                    f"phase {self.name!r}: learning_rate_factors[{role!r}] must be at least 0, "
                    f"got {factor}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class WireScheme:
    """How the adapter tensors of an update are put into few bytes."""

    version: int = WIRE_VERSION
    codec: str
    """Codec of matrices, or ``adaptive``: the device chooses one per tensor within
    ``budget_bytes``. Vectors and small matrices travel in fp16."""
    delta: bool = True
    """Send changes against the adapter as received."""
    stochastic: bool = False
    """Round stochastically, so that the expectation is exact."""
    rotation_block: int = 0
    """Length of the blocks of a randomised Hadamard rotation, a power of two; 0: no rotation."""
    error_feedback: bool = False
    """Add what earlier updates left out, and keep what this one leaves out."""
    top_share: float = 1 / 64
    """Share of the elements that ``topk`` keeps, in (0, 1]."""
    budget_bytes: int = 0
    """``adaptive``: most bytes of all codes and scales together."""
    compressed: bool = True
    """Compress the update losslessly where that makes it smaller."""
    stream: str = ""
    """Name of the sequence of updates that error feedback runs along."""
    round: int = 0
    """Number of the round in its run."""
    counted_round: int | None = None
    """Last round whose update from this device was counted; None: none was. The device goes on
    from what it left out then."""
    importance: str = "second-moment"
    """``adaptive``: weight of a tensor's squared error, one of ``IMPORTANCES``."""
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    """Importance ``server``: the weight of each tensor; 1 where absent."""

    def __post_init__(self) -> None:
        if self.version != WIRE_VERSION:
            raise PlanError(
                f"wire scheme version {self.version} is not {WIRE_VERSION}; update the SDK"
            )
        if not self.codec:
            raise PlanError("wire.codec is empty; name a codec or adaptive")
        block = self.rotation_block
        if block and not (2 <= block <= MAX_ROTATION_BLOCK and not block & (block - 1)):
            raise PlanError(
                f"wire.rotation_block must be 0 or a power of two up to {MAX_ROTATION_BLOCK}, "
                f"got {block}"
            )
        if not 0 < self.top_share <= 1:
            raise PlanError(f"wire.top_share must lie in (0, 1], got {self.top_share}")
        if (self.codec == ADAPTIVE) != (self.budget_bytes > 0):
            raise PlanError(
                f"wire.budget_bytes belongs to codec {ADAPTIVE} and is above 0 there, got "
                f"{self.budget_bytes} with codec {self.codec!r:.80}"
            )
        if self.importance not in IMPORTANCES:
            raise PlanError(
                f"wire.importance must be one of {IMPORTANCES}, got {self.importance!r}"
            )
        for name, weight in self.sensitivity.items():
            if not 0 <= weight < math.inf:
                raise PlanError(f"wire.sensitivity of {name:.200} must be at least 0, got {weight}")
        if self.error_feedback and not (self.delta and self.stream):
            raise PlanError("wire.error_feedback needs delta and the name of a stream")
        if self.counted_round is not None and not 0 <= self.counted_round < self.round:
            raise PlanError(
                f"wire.counted_round must lie in 0..{self.round - 1}, got {self.counted_round}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """What the server expects of a plan; for reports, nothing on the device depends on it."""

    device_class: str = ""
    precision: str = ""
    rank: int = 0
    trained_layers: tuple[int, ...] = ()
    kept_layers: tuple[int, ...] = ()
    micro_batch: int = 0
    predicted_peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one device does in one round."""

    version: int = PLAN_VERSION
    method: str
    inputs: Mapping[str, float] = field(default_factory=dict)
    """Values of the graph's scalar inputs by name, for example ``lora_scale``."""
    phases: tuple[Phase, ...] = ()
    operations: tuple[Operation, ...] = ()
    """Operations after training, in order."""
    send: tuple[str, ...] = ()
    """Tensors to send; empty: what the operations produced, or else all that were trained."""
    codec: str = "fp32"
    """Wire codec of the update."""
    max_length: int = 128
    """Longest input in tokens."""
    seed: int = 0
    facts: PlanFacts = PlanFacts()
    wire: WireScheme | None = None
    """How adapter tensors of the update travel; None: as plain values in ``codec``."""

    def __post_init__(self) -> None:
        if self.version != PLAN_VERSION:
            raise PlanError(f"plan version {self.version} is not {PLAN_VERSION}; update the SDK")
        if not self.phases and not self.operations:
            raise PlanError("plan does nothing: it has neither phases nor operations")
        if self.max_length < 1:
            raise PlanError(f"max_length must be at least 1, got {self.max_length}")
        if self.max_length > MAX_LENGTH:
            raise PlanError(f"max_length must be at most {MAX_LENGTH}, got {self.max_length}")
        for name, value in self.inputs.items():
            if not math.isfinite(value):
                raise PlanError(f"inputs[{name!r}] must be finite, got {value}")
