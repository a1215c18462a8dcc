# SPDX-License-Identifier: Apache-2.0
"""Typed values <-> generated messages, for both ends."""

from __future__ import annotations

import dataclasses

from lorikit.proto.device import EngineInfo, Profile, TrainingReport
from lorikit.proto.limits import MAX_PLAN_LIST, MAX_PLAN_OPERATIONS, MAX_PLAN_PHASES
from lorikit.proto.manifest import BlobRef
from lorikit.proto.plan import (
    IMPORTANCES,
    PLAN_VERSION,
    Operation,
    OptimizerConfig,
    Phase,
    Plan,
    PlanError,
    PlanFacts,
    Value,
    WireScheme,
)
from lorikit.proto.v1 import device_service_pb2, plan_pb2


def plan_to_message(plan: Plan) -> plan_pb2.Plan:
    """The plan as it travels."""
    return plan_pb2.Plan(
        version=plan.version,
        method=plan.method,
        inputs=plan.inputs,
        phases=[_phase_to_message(phase) for phase in plan.phases],
        operations=[_operation_to_message(operation) for operation in plan.operations],
        send=plan.send,
        codec=plan.codec,
        max_length=plan.max_length,
        seed=plan.seed,
        facts=plan_pb2.PlanFacts(**dataclasses.asdict(plan.facts)),
        wire=None if plan.wire is None else plan_pb2.WireScheme(**dataclasses.asdict(plan.wire)),
    )


def plan_from_message(message: plan_pb2.Plan) -> Plan:
    """The plan that travelled.

    Raises:
        PlanError: Another plan version (checked first), or a field out of range.
    """
    if message.version != PLAN_VERSION:
        raise PlanError(f"plan version {message.version} is not {PLAN_VERSION}; update the SDK")
    _check_counts(message)
    facts = message.facts
    return Plan(
        version=message.version,
        method=message.method,
        inputs=dict(message.inputs),
        phases=tuple(_phase_from_message(phase) for phase in message.phases),
        operations=tuple(_operation_from_message(operation) for operation in message.operations),
        send=tuple(message.send),
        codec=message.codec,
        max_length=message.max_length,
        seed=message.seed,
        facts=PlanFacts(
            device_class=facts.device_class,
            precision=facts.precision,
            rank=facts.rank,
            trained_layers=tuple(facts.trained_layers),
            kept_layers=tuple(facts.kept_layers),
            micro_batch=facts.micro_batch,
            predicted_peak_memory_bytes=facts.predicted_peak_memory_bytes,
        ),
        wire=_wire_from_message(message.wire) if message.HasField("wire") else None,
    )


def _check_counts(plan: plan_pb2.Plan) -> None:
    """Refuse a plan with more parts than any plan has, before typed values are made of them."""
    counts = [
        ("phases", len(plan.phases), MAX_PLAN_PHASES),
        ("operations", len(plan.operations), MAX_PLAN_OPERATIONS),
        ("send", len(plan.send), MAX_PLAN_LIST),
        ("inputs", len(plan.inputs), MAX_PLAN_LIST),
        ("facts.trained_layers", len(plan.facts.trained_layers), MAX_PLAN_LIST),
        ("facts.kept_layers", len(plan.facts.kept_layers), MAX_PLAN_LIST),
    ]
    for phase in plan.phases:
        counts.append(("phase.train", len(phase.train), MAX_PLAN_LIST))
        counts.append(
            ("phase.gradient_operations", len(phase.gradient_operations), MAX_PLAN_OPERATIONS)
        )
        counts.append(
            ("phase.learning_rate_factors", len(phase.learning_rate_factors), MAX_PLAN_LIST)
        )
    for name, count, most in counts:
        if count > most:
            raise PlanError(f"{name} has {count} entries, {most} allowed")


def profile_to_message(profile: Profile) -> device_service_pb2.Profile:
    """The profile as it travels."""
    return device_service_pb2.Profile(**dataclasses.asdict(profile))


def profile_from_message(message: device_service_pb2.Profile) -> Profile:
    """The profile that travelled; ranges are the receiver's to check."""
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(Profile)}
    fields["engines"] = tuple(EngineInfo(name=e.name, version=e.version) for e in message.engines)
    fields["operations"] = tuple(message.operations)
    fields["codecs"] = tuple(message.codecs)
    return Profile(**fields)


def report_to_message(report: TrainingReport) -> device_service_pb2.TrainingReport:
    """The report as it travels."""
    return device_service_pb2.TrainingReport(**dataclasses.asdict(report))


def report_from_message(message: device_service_pb2.TrainingReport) -> TrainingReport:
    """The report that travelled."""
    return TrainingReport(
        **{f.name: getattr(message, f.name) for f in dataclasses.fields(TrainingReport)}
    )


def blob_to_message(blob: BlobRef) -> device_service_pb2.BlobRef:
    """The blob's name as it travels."""
    return device_service_pb2.BlobRef(digest=blob.digest, size=blob.size)


def blob_from_message(message: device_service_pb2.BlobRef) -> BlobRef:
    """The blob's name that travelled; raises ``ManifestError`` if it is not a digest."""
    return BlobRef(digest=message.digest, size=message.size)


def _wire_from_message(message: plan_pb2.WireScheme) -> WireScheme:
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(WireScheme)}
    if not message.HasField("counted_round"):
        fields["counted_round"] = None
    fields["importance"] = message.importance or IMPORTANCES[0]
    fields["sensitivity"] = dict(message.sensitivity)
    return WireScheme(**fields)


def _phase_to_message(phase: Phase) -> plan_pb2.Phase:
    return plan_pb2.Phase(
        name=phase.name,
        train=phase.train,
        steps=phase.steps,
        batch_size=phase.batch_size,
        micro_batch=phase.micro_batch,
        optimizer=plan_pb2.Optimizer(**dataclasses.asdict(phase.optimizer)),
        learning_rate_factors=phase.learning_rate_factors,
        gradient_operations=[_operation_to_message(op) for op in phase.gradient_operations],
        seed=phase.seed,
    )


_ADDED_LATER = ("state_bits", "perturbation", "directions")
"""Fields of the optimiser whose zero says that the sender does not know them."""


def _phase_from_message(message: plan_pb2.Phase) -> Phase:
    optimizer = {
        f.name: getattr(message.optimizer, f.name) for f in dataclasses.fields(OptimizerConfig)
    }
    for name in _ADDED_LATER:
        if not optimizer[name]:
            del optimizer[name]
    return Phase(
        name=message.name,
        train=tuple(message.train),
        steps=message.steps,
        batch_size=message.batch_size,
        micro_batch=message.micro_batch,
        optimizer=OptimizerConfig(**optimizer),
        learning_rate_factors=dict(message.learning_rate_factors),
        gradient_operations=tuple(_operation_from_message(o) for o in message.gradient_operations),
        seed=message.seed,
    )


def _operation_to_message(operation: Operation) -> plan_pb2.Operation:
    return plan_pb2.Operation(
        name=operation.name,
        version=operation.version,
        arguments={name: _value_to_message(v) for name, v in operation.arguments.items()},
    )


def _operation_from_message(message: plan_pb2.Operation) -> Operation:
    return Operation(
        name=message.name,
        version=message.version,
        arguments={name: _value_from_message(v) for name, v in message.arguments.items()},
    )


def _value_to_message(value: Value) -> plan_pb2.Value:
    if isinstance(value, bool):
        return plan_pb2.Value(flag=value)
    if isinstance(value, int):
        return plan_pb2.Value(integer=value)
    if isinstance(value, float):
        return plan_pb2.Value(number=value)
    if isinstance(value, str):
        return plan_pb2.Value(text=value)
    if all(isinstance(item, str) for item in value):
        return plan_pb2.Value(texts=plan_pb2.TextList(items=[str(item) for item in value]))
    if all(isinstance(item, int) for item in value):
        return plan_pb2.Value(integers=plan_pb2.IntegerList(items=[int(item) for item in value]))
    return plan_pb2.Value(numbers=plan_pb2.NumberList(items=[float(item) for item in value]))


def _value_from_message(message: plan_pb2.Value) -> Value:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise PlanError("an operation's argument has no value of a known kind; update the SDK")
    value = getattr(message, kind)
    if kind in ("numbers", "integers", "texts"):
        if len(value.items) > MAX_PLAN_LIST:
            raise PlanError(
                f"an operation's argument has {len(value.items)} entries, {MAX_PLAN_LIST} allowed"
            )
        return tuple(value.items)
    return value  # type: ignore[no-any-return]  # one of the scalar kinds
