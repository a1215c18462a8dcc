# SPDX-License-Identifier: Apache-2.0
"""Typed values survive the wire, and the wire has a field for each of theirs."""

from __future__ import annotations

import dataclasses

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from lorikit.proto.device import EngineInfo, Profile, TrainingReport
from lorikit.proto.limits import MAX_LENGTH, MAX_PLAN_STEPS
from lorikit.proto.manifest import BlobRef, ManifestError
from lorikit.proto.plan import (
    OPERATIONS,
    Operation,
    OptimizerConfig,
    Phase,
    Plan,
    PlanError,
    PlanFacts,
    WireScheme,
)
from lorikit.proto.v1 import device_service_pb2, plan_pb2
from lorikit.proto.wire import (
    blob_from_message,
    blob_to_message,
    plan_from_message,
    plan_to_message,
    profile_from_message,
    profile_to_message,
    report_from_message,
    report_to_message,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-12, max_value=1e6)
not_negative = st.floats(min_value=0, max_value=1e6)
fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
text = st.text(max_size=12)


def tuples(items: st.SearchStrategy[object], *, least: int = 0) -> st.SearchStrategy[tuple]:  # type: ignore[type-arg]  # of anything
    return st.lists(items, min_size=least, max_size=4).map(tuple)


scalars = st.one_of(finite, int64, text, st.booleans())
values = st.one_of(scalars, tuples(finite, least=1), tuples(int64), tuples(text))
operations = st.builds(
    Operation,
    name=st.sampled_from(sorted(OPERATIONS)) | text,
    version=uint32,
    arguments=st.dictionaries(text, values, max_size=4),
)
optimizers = st.builds(
    OptimizerConfig,
    name=st.sampled_from(("adamw", "sgd")),
    learning_rate=positive,
    beta1=fractions,
    beta2=fractions,
    epsilon=positive,
    weight_decay=not_negative,
    momentum=fractions,
    clip_norm=not_negative,
    schedule=st.sampled_from(("constant", "linear", "cosine")),
    warmup_steps=uint32,
    state_bits=st.sampled_from((8, 32)),
    perturbation=positive,
    directions=st.integers(1, 2**32 - 1),
    seeds=uint32,
)
phases = st.integers(1, 512).flatmap(
    lambda batch_size: st.builds(
        Phase,
        name=text,
        train=tuples(text, least=1),
        steps=st.integers(1, MAX_PLAN_STEPS),
        batch_size=st.just(batch_size),
        micro_batch=st.integers(1, batch_size),
        optimizer=optimizers,
        learning_rate_factors=st.dictionaries(text, not_negative, max_size=3),
        gradient_operations=tuples(operations),
        seed=uint64,
    )
)
facts = st.builds(
    PlanFacts,
    device_class=text,
    precision=text,
    rank=uint32,
    trained_layers=tuples(uint32),
    kept_layers=tuples(uint32),
    micro_batch=uint32,
    predicted_peak_memory_bytes=uint64,
)
wires = st.builds(
    lambda round, counted, **rest: WireScheme(
        round=round,
        counted_round=counted if counted is not None and counted < round else None,
        **rest,
    ),
    codec=text.filter(lambda name: name not in ("", "adaptive")),
    delta=st.just(True),
    stochastic=st.booleans(),
    rotation_block=st.sampled_from((0, 2, 64, 65536)),
    error_feedback=st.booleans(),
    top_share=st.floats(min_value=1e-9, max_value=1),
    compressed=st.booleans(),
    stream=text.filter(bool),
    round=uint32,
    counted=st.none() | st.just(0) | uint32,
)
plans = st.builds(
    Plan,
    method=text,
    inputs=st.dictionaries(text, finite, max_size=3),
    phases=tuples(phases, least=1),
    operations=tuples(operations),
    send=tuples(text),
    codec=text,
    max_length=st.integers(1, MAX_LENGTH),
    seed=uint64,
    facts=facts,
    wire=st.none() | wires,
)
profiles = st.builds(
    Profile,
    device_class=text,
    memory_limit_bytes=uint64,
    memory_total_bytes=uint64,
    cores=uint32,
    speed_gflops=finite,
    storage_free_bytes=uint64,
    platform=text,
    sdk_version=text,
    engines=tuples(st.builds(EngineInfo, name=text, version=text)),
    plan_version=uint32,
    operations=tuples(text),
    codecs=tuples(text),
    memory_baseline_bytes=uint64,
    download_bytes_per_second=finite,
    upload_bytes_per_second=finite,
)
reports = st.builds(
    TrainingReport,
    examples=uint64,
    dataset_size=uint64,
    first_loss=finite,
    last_loss=finite,
    accuracy=finite,
    training_seconds=finite,
    download_seconds=finite,
    peak_memory_bytes=uint64,
    anonymous_memory_bytes=uint64,
    engine=text,
    bytes_down=uint64,
    steps=uint32,
    rank=uint32,
)


@given(plans)
def test_plan_survives_the_wire(plan: Plan) -> None:
    travelled = plan_pb2.Plan.FromString(plan_to_message(plan).SerializeToString())

    assert plan_from_message(travelled) == plan


@given(profiles)
def test_profile_survives_the_wire(profile: Profile) -> None:
    travelled = profile_to_message(profile).SerializeToString()

    assert profile_from_message(device_service_pb2.Profile.FromString(travelled)) == profile


@given(reports)
def test_report_survives_the_wire(report: TrainingReport) -> None:
    travelled = report_to_message(report).SerializeToString()

    assert report_from_message(device_service_pb2.TrainingReport.FromString(travelled)) == report


def test_blob_reference_survives_the_wire() -> None:
    blob = BlobRef(digest="0123456789abcdef" * 4, size=2**40)

    assert blob_from_message(blob_to_message(blob)) == blob


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "0" * 63, "A" * 64, "0" * 64 + "\n"])
def test_blob_reference_that_is_no_digest_is_refused(digest: str) -> None:
    with pytest.raises(ManifestError, match="not a SHA-256 digest"):
        blob_from_message(device_service_pb2.BlobRef(digest=digest, size=1))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1.0, "number"),
        (1, "integer"),
        (True, "flag"),
        ("1", "text"),
        ((1.0, 2.5), "numbers"),
        ((1, 2.5), "numbers"),
        ((1, 2), "integers"),
        (("1",), "texts"),
    ],
)
def test_argument_keeps_its_kind(value: object, kind: str) -> None:
    plan = Plan(
        method="fedit",
        operations=(Operation(name="x", arguments={"a": value}),),  # type: ignore[dict-item]
    )

    message = plan_to_message(plan)

    assert message.operations[0].arguments["a"].WhichOneof("kind") == kind
    assert type(plan_from_message(message).operations[0].arguments["a"]) is type(value)


def good_message() -> plan_pb2.Plan:
    phase = Phase(train=("a",), steps=1, batch_size=1, micro_batch=1)
    return plan_to_message(Plan(method="fedit", phases=(phase,)))


def test_newer_plan_is_refused_before_any_other_field() -> None:
    message = good_message()
    message.version = 2
    message.phases[0].steps = 0

    with pytest.raises(PlanError, match="plan version 2 is not 1; update the SDK"):
        plan_from_message(message)


def test_plan_without_a_version_is_refused() -> None:
    with pytest.raises(PlanError, match="plan version 0"):
        plan_from_message(plan_pb2.Plan())


def test_phase_without_an_optimizer_is_refused() -> None:
    message = good_message()
    message.phases[0].ClearField("optimizer")

    with pytest.raises(PlanError, match=r"optimizer\.name"):
        plan_from_message(message)


def test_argument_of_an_unknown_kind_is_refused() -> None:
    message = good_message()
    message.operations.add(name="prune_tail", version=1).arguments["keep"].Clear()

    with pytest.raises(PlanError, match="no value of a known kind; update the SDK"):
        plan_from_message(message)


def test_optimizer_of_a_sender_that_knows_fewer_fields_is_as_it_was() -> None:
    plan = Plan(
        method="fedit",
        phases=(Phase(train=("a",), steps=1, batch_size=1, micro_batch=1),),
    )
    message = plan_to_message(plan)
    for name in ("state_bits", "perturbation", "directions", "seeds"):
        message.phases[0].optimizer.ClearField(name)

    assert plan_from_message(message) == plan


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (Plan, plan_pb2.Plan.DESCRIPTOR),
        (PlanFacts, plan_pb2.PlanFacts.DESCRIPTOR),
        (Phase, plan_pb2.Phase.DESCRIPTOR),
        (Operation, plan_pb2.Operation.DESCRIPTOR),
        (OptimizerConfig, plan_pb2.Optimizer.DESCRIPTOR),
        (Profile, device_service_pb2.Profile.DESCRIPTOR),
        (EngineInfo, device_service_pb2.EngineInfo.DESCRIPTOR),
        (TrainingReport, device_service_pb2.TrainingReport.DESCRIPTOR),
        (BlobRef, device_service_pb2.BlobRef.DESCRIPTOR),
    ],
)
def test_typed_value_and_message_have_the_same_fields(typed: type, message: Descriptor) -> None:
    assert {field.name for field in dataclasses.fields(typed)} == set(message.fields_by_name)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.phases.extend([plan_pb2.Phase()] * 65),
        lambda plan: plan.operations.extend([plan_pb2.Operation()] * 257),
        lambda plan: plan.send.extend(["x"] * 100_001),
        lambda plan: plan.facts.kept_layers.extend([0] * 100_001),
        lambda plan: plan.phases.add().train.extend(["x"] * 100_001),
        lambda plan: (
            plan.operations.add(name="x").arguments["a"].integers.items.extend([0] * 100_001)
        ),
    ],
)
def test_plan_with_too_many_parts_is_refused(change) -> None:
    message = plan_pb2.Plan(version=1, method="x")
    change(message)

    with pytest.raises(PlanError, match="allowed"):
        plan_from_message(message)
