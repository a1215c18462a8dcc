# SPDX-License-Identifier: Apache-2.0
"""From what a method wants of a device to the plan that travels and the update that may come back.

All of it is pure: equal arguments give equal plans, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lorikit.proto.device import Profile
from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.plan import Operation, Phase, Plan, PlanFacts
from lorikit.server.config import RunConfig
from lorikit.server.errors import CompileError
from lorikit.server.methods.base import Assignment

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensor:
    """A tensor that an update must have."""

    shape: tuple[int, ...]
    """Lengths; on the rank axis the largest allowed."""
    rank_axis: int | None = None
    """Axis of the LoRA rank, which may come back shorter (after pruning), never longer or empty."""
    module: str = ""
    """LoRA module; its two tensors have one rank."""
    is_statistic: bool = False
    """Not an adapter tensor, so that the bound on the norm does not apply."""


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
) -> Plan:
    """The plan of one device for one round.

    Args:
        config: Settings of the run.
        assignment: What the method wants.
        choice: What the planner chose for it.
        adapter: Adapter tensors of the chosen package.
        profile: The device's.
        round_number: Joins the seed, so that no two rounds draw the same order of data.

    Raises:
        CompileError: The assignment trains a tensor that the package holds still.
    """
    trained = trained_names(assignment, adapter) if assignment.train else ()
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
        codec=config.codec if config.codec in profile.codecs else "fp32",
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
    expected = {name: _expected(tensors[name], assignment) for name in plan.send if name in tensors}
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


def _expected(tensor: AdapterTensor, assignment: Assignment) -> ExpectedTensor:
    if "rank" not in tensor.shape:
        return ExpectedTensor(shape=tuple(int(length) for length in tensor.shape))
    rank = assignment.ranks[tensor.module]
    return ExpectedTensor(
        shape=tuple(rank if length == "rank" else int(length) for length in tensor.shape),
        rank_axis=tensor.shape.index("rank"),
        module=tensor.module,
    )


def _head_width(tensors: Iterable[AdapterTensor], classes: int) -> int:
    """Width of the features that the last layer of the head reads."""
    for tensor in tensors:
        if tensor.role == "head" and len(tensor.shape) == 2 and tensor.shape[0] == classes:
            return int(tensor.shape[1])
    return 0
