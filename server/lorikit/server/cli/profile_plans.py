# SPDX-License-Identifier: Apache-2.0
"""What a device class gets for a model: plan, memory by part, operations, time, traffic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorikit.server.cli.device_classes import DeviceClass
from lorikit.server.planner.choice import Choice, DoesNotFitError
from lorikit.server.planner.memory import Footprint
from lorikit.server.planner.planner import Planner, lowest_trained_layer
from lorikit.server.planner.speed import step_flops
from lorikit.server.planner.step import StepShape

if TYPE_CHECKING:
    from lorikit.server.compile import Compiler
    from lorikit.server.methods.base import Assignment, Participant

BASELINE_BYTES = 36_000_000
"""Resident memory assumed for a device process before it trains: interpreter, numpy and gRPC
without their code, measured on Linux x86-64; the planner adds the runtime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the operating system said of a rehearsed plan."""

    peak_bytes: int
    anonymous_bytes: int
    seconds_per_step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPlan:
    """What a class that fits gets."""

    device_class: DeviceClass
    choice: Choice
    rank: int
    trained_layers: tuple[int, ...]
    kept_layers: tuple[int, ...]
    lowest_trained_layer: int
    footprint: Footprint
    flops_per_step: int
    base_bytes: int
    """Downloaded once."""
    bytes_down: int
    """Per round: the adapter."""
    bytes_up: int
    """Per round: what trained, as plain float32 values."""
    measured: Measured | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Why a class does not fit, and what would help."""

    device_class: DeviceClass
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The step that is planned."""

    rank: int
    batch_size: int
    length: int


def plan_for(
    compiler: Compiler, planner: Planner, device_class: DeviceClass, work: Work
) -> ClassPlan | Misfit:
    """The fullest work that a class can do, and how; or why it can do none."""
    profile = device_class.profile(baseline_bytes=BASELINE_BYTES)
    try:
        participant = planner.participant(device_class.name, profile, {})
        assignment = fullest_assignment(compiler, participant, work.rank)
        choice = planner.choose(profile, assignment)
    except DoesNotFitError as error:
        return Misfit(device_class=device_class, reason=error.reason, remedy=error.remedy)
    return _class_plan(compiler, device_class, assignment, choice, work)


def _class_plan(
    compiler: Compiler,
    device_class: DeviceClass,
    assignment: Assignment,
    choice: Choice,
    work: Work,
) -> ClassPlan:
    rank = max(assignment.ranks.values(), default=1)
    lowest = lowest_trained_layer(assignment, compiler.layer_count)
    step = StepShape(
        precision=choice.precision,
        lowest_trained_layer=lowest,
        kept_layers=tuple(assignment.kept_layers),
        rank=rank,
        micro_batch=choice.micro_batch,
        length=work.length,
        recomputed_layers=choice.recomputed_layers,
        kernels=choice.kernels,
    )
    every, trained = _adapter_bytes(compiler, assignment, rank)
    return ClassPlan(
        device_class=device_class,
        choice=choice,
        rank=rank,
        trained_layers=tuple(assignment.trained_layers),
        kept_layers=tuple(assignment.kept_layers),
        lowest_trained_layer=lowest,
        footprint=compiler.footprint(step, baseline_bytes=BASELINE_BYTES),
        flops_per_step=step_flops(compiler, step, work.batch_size),
        base_bytes=compiler.base_bytes(choice.precision),
        bytes_down=every,
        bytes_up=trained,
    )


def _adapter_bytes(compiler: Compiler, assignment: Assignment, rank: int) -> tuple[int, int]:
    """Bytes of the adapter in float32, and of the part of it that trains."""
    every = trained = 0
    for tensor in compiler.space(rank).tensors:
        if tensor.layer >= 0 and tensor.layer not in assignment.kept_layers:
            continue
        size = 4
        for length in tensor.shape:
            size *= rank if length == "rank" else int(length)
        every += size
        trained += size if tensor.layer < 0 or tensor.layer in assignment.trained_layers else 0
    return every, trained


def fullest_assignment(compiler: Compiler, participant: Participant, rank: int) -> Assignment:
    """The most a device can train: its greatest depth, and the largest rank at that depth."""
    from lorikit.server.methods.base import Assignment

    layers = tuple(range(compiler.layer_count))
    if participant.max_depth:
        kept, trained = layers, layers[-participant.max_depth :]
    else:
        kept = trained = layers[-participant.max_layers :]
    space = compiler.space(rank)
    return Assignment(
        device_id=participant.device_id,
        ranks={a.module: participant.max_rank for a, _ in space.pairs() if a.layer in kept},
        trained_layers=trained,
        kept_layers=kept,
    )


def facts(entry: ClassPlan | Misfit) -> Mapping[str, object]:
    """One class as the JSON of ``lorikit profile`` has it."""
    device_class = entry.device_class
    known: dict[str, object] = {
        "class": device_class.name,
        "memory_limit_bytes": device_class.memory_limit_bytes,
        "cores": device_class.cores,
        "speed_gflops": device_class.speed_gflops,
        "source": device_class.source,
    }
    if isinstance(entry, Misfit):
        return known | {
            "fits": False,
            "plan": None,
            "predicted_peak_memory_bytes": None,
            "measured_peak_memory_bytes": None,
            "breakdown": None,
            "seconds_per_step": None,
            "reason": entry.reason,
            "remedy": entry.remedy,
        }
    choice, measured = entry.choice, entry.measured
    return known | {
        "fits": True,
        "plan": {
            "precision": choice.precision,
            "runtime": choice.runtime,
            "kernels": choice.kernels,
            "micro_batch": choice.micro_batch,
            "rank": entry.rank,
            "trained_layers": list(entry.trained_layers),
            "kept_layers": list(entry.kept_layers),
            "recomputed_layers": list(choice.recomputed_layers),
            "bound": choice.bound,
        },
        "predicted_peak_memory_bytes": choice.predicted_peak_memory_bytes,
        "measured_peak_memory_bytes": measured.peak_bytes if measured else None,
        "measured_anonymous_memory_bytes": measured.anonymous_bytes if measured else None,
        "breakdown": dataclasses.asdict(entry.footprint),
        "flops_per_step": entry.flops_per_step,
        "seconds_per_step": choice.seconds_per_step,
        "measured_seconds_per_step": measured.seconds_per_step if measured else None,
        "bytes_down_once": entry.base_bytes,
        "bytes_down_per_round": entry.bytes_down,
        "bytes_up_per_round": entry.bytes_up,
    }
