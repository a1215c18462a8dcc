# SPDX-License-Identifier: Apache-2.0
"""From what a method wants of a device to the plan that travels and the update that may come back.

All of it is pure: equal arguments give equal plans, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorikit.proto.device import Profile
from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.plan import (
    ADAPTIVE,
    WIRE_FEATURE,
    Operation,
    Phase,
    Plan,
    PlanFacts,
    WireScheme,
)
from lorikit.quantization.wire import check_scheme
from lorikit.server.config import RunConfig
from lorikit.server.errors import CompileError
from lorikit.server.methods import FACTS
from lorikit.server.methods.base import Assignment

PLAIN_CODECS = ("fp32", "fp16", "bf16")
"""Codecs that hold plain values unless options ask for a wire scheme."""

_OPTIONS = (
    "budget_bytes", "compressed", "delta", "error_feedback", "importance", "rotation_block",
    "stochastic", "top_share",
)  # fmt: skip
"""Options of a wire scheme that a run may set."""

_NAME_BYTES = 256
"""Room for the name, the shape and the framing of a tensor in an update."""


class Choice(Protocol):
    """What the planner chose for a device; see ``planner.Choice``."""

    @property
    def precision(self) -> str:
        """Codec of the base."""
        ...

    @property
    def micro_batch(self) -> int:
        """Examples per run of the graph."""
        ...

    @property
    def predicted_peak_memory_bytes(self) -> int:
        """Of the whole process."""
        ...

    @property
    def runtime(self) -> str:
        """Whose graph the device gets."""
        ...

    @property
    def memory_factor(self) -> float:
        """Learnt correction that the predicted peak was scaled by."""
        ...

    @property
    def recomputed_layers(self) -> tuple[int, ...]:
        """Layers whose forward values are made again for the backward pass."""
        ...

    @property
    def kernels(self) -> str:
        """``lean`` or ``fast``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensor:
    """A tensor that an update must have."""

    shape: tuple[int, ...]
    """Lengths; on the rank axis the largest allowed."""
    rank_axis: int | None = None
    """Axis of the LoRA rank where the plan prunes, so that it may come back shorter, never longer
    or empty; else the rank is the assigned one."""
    module: str = ""
    """LoRA module; its two tensors have one rank."""
    is_statistic: bool = False
    """Not an adapter tensor, so that the bound on the norm does not apply."""
    is_change: bool = False
    """Whether it travels as the change against the adapter that the device received."""


Expected = Mapping[str, ExpectedTensor]
"""All tensors of an update by name."""


def seed_of(*parts: object) -> int:
    """A seed that depends on each part and its place, in [0, 2^63)."""
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def identifier(*parts: object) -> str:
    """A name that is the same for the same parts, 32 hexadecimal digits."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_plan(
    config: RunConfig,
    assignment: Assignment,
    choice: Choice,
    adapter: Iterable[AdapterTensor],
    profile: Profile,
    *,
    round_number: int,
    counted_round: int | None = None,
    sensitivity: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of one device for one round.

    Args:
        config: Settings of the run.
        assignment: What the method wants.
        choice: What the planner chose for it.
        adapter: Adapter tensors of the chosen package.
        profile: The device's.
        round_number: Joins the seed, so that no two rounds draw the same order of data.
        counted_round: Last earlier round whose update from this device was counted; None if none.
        sensitivity: Measured weight of each tensor's error; None where none is asked for.

    Raises:
        CompileError: The assignment trains a tensor that the package holds still.
    """
    trained = trained_names(assignment, adapter) if assignment.train else ()
    wire = _wire(config, profile, trained, round_number, counted_round)
    if wire is not None and sensitivity:
        weights = {name: sensitivity[name] for name in trained if name in sensitivity}
        wire = dataclasses.replace(wire, sensitivity=weights)
    seed = seed_of("plan", config.seed, round_number, assignment.device_id)
    phases = (
        (
            Phase(
                train=trained,
                steps=config.local_steps,
                batch_size=config.batch_size,
                micro_batch=min(choice.micro_batch, config.batch_size),
                optimizer=config.optimizer,
                learning_rate_factors=config.learning_rate_factors,
                gradient_operations=assignment.gradient_operations,
            ),
        )
        if trained
        else ()
    )
    return Plan(
        method=config.method,
        inputs={"lora_scale": assignment.scale},
        phases=phases,
        operations=assignment.operations,
        send=(*trained, *(name for o in assignment.operations for name in _statistics(o))),
        codec=_plain_codec(config, profile),
        wire=wire,
        max_length=config.max_length,
        seed=seed,
        facts=PlanFacts(
            device_class=profile.device_class,
            precision=choice.precision,
            rank=max(assignment.ranks.values(), default=0),
            trained_layers=assignment.trained_layers,
            kept_layers=assignment.kept_layers,
            micro_batch=choice.micro_batch,
            predicted_peak_memory_bytes=choice.predicted_peak_memory_bytes,
        ),
    )


def wire_scheme(
    config: RunConfig, *, round_number: int = 0, counted_round: int | None = None
) -> WireScheme | None:
    """How updates of the run travel; None: as plain values in the run's codec.

    Error feedback is on below 8 bits where the method keeps its coordinates from round to round;
    without it, rounding is stochastic.

    Raises:
        ValueError: Unknown codec or option, or a value out of range; names it.
    """
    check_scheme(config.codec)
    options: dict[str, Any] = dict(config.codec_options)
    check_options("codec_options", options, _OPTIONS)
    if config.codec in PLAIN_CODECS and not options:
        return None
    keeps = FACTS[config.method].keeps_coordinates
    feedback = options.get("error_feedback", is_coarse(config.codec) and keeps)
    if feedback and not keeps:
        raise ValueError(
            f"codec_options: error_feedback does not go with method {config.method}, which gives "
            "the adapter other coordinates each round; set it to false"
        )
    defaults = {"error_feedback": feedback, "stochastic": not feedback}
    if options.get("importance") == "server" and config.evaluation_data is None:
        raise ValueError("codec_options: importance server needs evaluation_data to measure on")
    if config.codec == ADAPTIVE and "budget_bytes" not in options:
        raise ValueError(f"codec {ADAPTIVE} needs budget_bytes in codec_options")
    return WireScheme(
        codec=config.codec,
        stream=identifier("wire", config.canonical()),
        round=round_number,
        counted_round=counted_round,
        **{**defaults, **options},
    )


def is_coarse(name: str) -> bool:
    """Whether a wire codec has so few bits that its errors must be fed back."""
    return name not in (*PLAIN_CODECS, "int8-block64")


def check_options(field: str, options: Mapping[str, object], known: Sequence[str]) -> None:
    """Refuse an option of a wire scheme that is unknown, or of another kind than its default.

    Raises:
        ValueError: Names the field, the option and its value.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(WireScheme)}
    for name, value in sorted(options.items()):
        if name not in known:
            raise ValueError(f"{field}: {name!r:.80} is unknown; known are {', '.join(known)}")
        kind = type(defaults[name])
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{field}: {name} must be of type {kind.__name__}, got {value!r:.80}")


def trained_names(assignment: Assignment, adapter: Iterable[AdapterTensor]) -> tuple[str, ...]:
    """Names of the tensors that the assignment trains, in the order given.

    Raises:
        CompileError: The package holds one of them still.
    """
    names = []
    for tensor in adapter:
        if not moves(tensor, assignment):
            continue
        if not tensor.trained:
            raise CompileError(
                f"{tensor.name}: the method trains it, the package has no gradient for it"
            )
        names.append(tensor.name)
    return tuple(names)


def moves(tensor: AdapterTensor, assignment: Assignment) -> bool:
    """Whether the assignment trains the tensor."""
    if tensor.role not in assignment.train_roles:
        return False
    if tensor.role == "head":
        return assignment.train_head
    return tensor.layer < 0 or tensor.layer in assignment.trained_layers


def missing_operations(plan: Plan, profile: Profile) -> tuple[str, ...]:
    """Operations of the plan, as ``name@version``, that the device's SDK cannot carry out."""
    operations = [*plan.operations, *(o for p in plan.phases for o in p.gradient_operations)]
    wanted = {f"{operation.name}@{operation.version}" for operation in operations}
    return tuple(sorted(wanted - set(profile.operations)))


def expected_update(
    plan: Plan, assignment: Assignment, adapter: Iterable[AdapterTensor], *, classes: int
) -> dict[str, ExpectedTensor]:
    """What the update of that plan must hold."""
    tensors = {tensor.name: tensor for tensor in adapter}
    is_change = plan.wire is not None and plan.wire.delta
    prunes = any(operation.name == "prune_tail" for operation in plan.operations)
    expected = {
        name: dataclasses.replace(
            _expected(tensors[name], assignment, prunes=prunes), is_change=is_change
        )
        for name in plan.send
        if name in tensors
    }
    width = _head_width(tensors.values(), classes)
    for operation in plan.operations:
        shapes = _statistics(operation, classes=classes, width=width)
        expected |= {n: ExpectedTensor(shape=s, is_statistic=True) for n, s in shapes.items()}
    return expected


def largest_update_bytes(expected: Expected) -> int:
    """Bytes that an honest update cannot exceed, whatever its codec."""
    total = 4096
    for name, tensor in expected.items():
        elements = 1
        for length in tensor.shape:
            elements *= length
        total += 4 * elements + len(name) + _NAME_BYTES
    return total


def expected_to_json(expected: Expected) -> str:
    """Text for the store."""
    return json.dumps({name: dataclasses.asdict(t) for name, t in expected.items()})


def expected_from_json(text: str) -> dict[str, ExpectedTensor]:
    """What ``expected_to_json`` was given."""
    return {
        name: ExpectedTensor(**{**fields, "shape": tuple(fields["shape"])})
        for name, fields in json.loads(text).items()
    }


def assignment_to_json(assignment: Assignment) -> str:
    """Text for the store."""
    return json.dumps(dataclasses.asdict(assignment), sort_keys=True)


def assignment_from_json(text: str) -> Assignment:
    """What ``assignment_to_json`` was given."""
    fields: dict[str, Any] = json.loads(text)
    for name in ("trained_layers", "kept_layers", "train_roles"):
        fields[name] = tuple(fields[name])
    for name in ("gradient_operations", "operations"):
        fields[name] = tuple(_operation(operation) for operation in fields[name])
    return Assignment(**fields)


def _plain_codec(config: RunConfig, profile: Profile) -> str:
    """Codec of what does not travel by a wire scheme, such as statistics."""
    is_plain = config.codec in PLAIN_CODECS and config.codec in profile.codecs
    return config.codec if is_plain else "fp32"


def _wire(
    config: RunConfig,
    profile: Profile,
    trained: tuple[str, ...],
    round_number: int,
    counted_round: int | None,
) -> WireScheme | None:
    """The run's scheme where the device knows it and has adapter tensors to send."""
    if not trained or not {WIRE_FEATURE} <= set(profile.codecs):
        return None
    if config.codec != ADAPTIVE and config.codec not in profile.codecs:
        return None
    return wire_scheme(config, round_number=round_number, counted_round=counted_round)


def _operation(fields: Mapping[str, Any]) -> Operation:
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields["arguments"].items()
    }
    return Operation(name=fields["name"], version=fields["version"], arguments=arguments)


def _statistics(
    operation: Operation, *, classes: int = 0, width: int = 0
) -> dict[str, tuple[int, ...]]:
    """Shapes of what an operation after training produces beside the adapter, by name."""
    if operation.name != "class_sums":
        return {}
    shapes: dict[str, tuple[int, ...]] = {
        "statistics.class_sums": (classes, width),
        "statistics.class_counts": (classes,),
    }
    if operation.arguments.get("second_moments"):
        shapes["statistics.moments"] = (width, width)
    return shapes


def _expected(tensor: AdapterTensor, assignment: Assignment, *, prunes: bool) -> ExpectedTensor:
    if "rank" not in tensor.shape:
        return ExpectedTensor(shape=tuple(int(length) for length in tensor.shape))
    rank = assignment.ranks[tensor.module]
    return ExpectedTensor(
        shape=tuple(rank if length == "rank" else int(length) for length in tensor.shape),
        rank_axis=tensor.shape.index("rank") if prunes else None,
        module=tensor.module,
    )


def _head_width(tensors: Iterable[AdapterTensor], classes: int) -> int:
    """Width of the features that the last layer of the head reads."""
    for tensor in tensors:
        if tensor.role == "head" and len(tensor.shape) == 2 and tensor.shape[0] == classes:
            return int(tensor.shape[1])
    return 0
