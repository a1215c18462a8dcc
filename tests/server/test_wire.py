# SPDX-License-Identifier: Apache-2.0
"""Updates that travel as changes: what is refused, what is added back, and whole runs of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.server.federation import (
    LABELS,
    Crowd,
    Device,
    TinyChoice,
    final_adapters,
    make_space,
    profile,
    run_config,
    server_config,
    start_server,
    train,
)

from lorikit.proto.plan import ADAPTIVE, WIRE_FEATURE, Plan, WireScheme
from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Bundle, Tensors, WireHeader, pack, raw, unpack
from lorikit.proto.wire import plan_from_message
from lorikit.quantization import CODECS, wire
from lorikit.sdk._store import Residuals
from lorikit.sdk._wire import encode_with_feedback
from lorikit.server.errors import RequestError
from lorikit.server.methods.base import Assignment
from lorikit.server.plans import (
    ExpectedTensor,
    build_plan,
    expected_from_json,
    expected_to_json,
    expected_update,
    largest_update_bytes,
    wire_scheme,
)
from lorikit.server.states import RunState
from lorikit.server.updates import Update, read_adapter, read_update, with_received

WIRED = (*CODECS, WIRE_FEATURE)
EXPECTED = {
    "q.lora_A.weight": ExpectedTensor(shape=(8, 96), rank_axis=0, module="q", is_change=True),
    "q.lora_B.weight": ExpectedTensor(shape=(96, 8), rank_axis=1, module="q", is_change=True),
    "statistics.sums": ExpectedTensor(shape=(3, 4), is_statistic=True),
}
HEADER = WireHeader(
    version=1,
    scheme="int8-block64",
    delta=True,
    stochastic=False,
    rotation_block=64,
    seed=7,
    error_feedback=False,
    round=0,
)


def values(rank: int = 8) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {"q.lora_A.weight": (rank, 96), "q.lora_B.weight": (96, rank)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def update(
    header: WireHeader | None = HEADER, rank: int = 8, *, is_compressed: bool = False
) -> bytes:
    codec = wire.scheme_codec("int8-block64", top_share=1)
    tensors = {
        name: raw(value) if header is None else wire.encode(value, name, header, codec)
        for name, value in values(rank).items()
    }
    tensors["statistics.sums"] = raw(np.ones((3, 4), np.float32))
    bundle = Bundle(tensors, {"examples": 3.0}, header)
    return pack(wire.compressed(bundle) if is_compressed else bundle)


def read(data: bytes, max_norm: float = 1e4, expected: object = EXPECTED) -> Update:
    return read_update(data, expected, max_norm=max_norm)  # type: ignore[arg-type]  # a mapping


@pytest.mark.parametrize("is_compressed", [False, True])
def test_changes_are_decoded_and_added_to_what_the_device_received(is_compressed: bool) -> None:
    content = read(update(is_compressed=is_compressed))
    assert content.changes == {"q.lora_A.weight", "q.lora_B.weight"}
    assert content.scalars == {"examples": 3.0}

    received = {name: np.full(value.shape, 5, np.float32) for name, value in values().items()}
    whole = with_received(content, received)
    assert not whole.changes
    for name, value in values().items():
        # eight bits of values up to about 4
        np.testing.assert_allclose(whole.tensors[name], 5 + value, atol=0.06)
    np.testing.assert_array_equal(whole.tensors["statistics.sums"], 1)


def test_pruned_change_is_added_to_the_first_part() -> None:
    received = {name: np.full(value.shape, 5, np.float32) for name, value in values().items()}
    whole = with_received(read(update(rank=3)), received)
    assert whole.tensors["q.lora_A.weight"].shape == (3, 96)
    assert whole.tensors["q.lora_B.weight"].shape == (96, 3)


def refusal(data: bytes, **arguments: object) -> str:
    with pytest.raises(RequestError) as caught:
        read(data, **arguments)  # type: ignore[arg-type]  # of read
    assert caught.value.code is ErrorCode.UPDATE_INVALID
    return caught.value.detail


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "wire version 2 is not 1"),
        ({"scheme": "zip"}, "unknown wire scheme 'zip'"),
        ({"scheme": "int4"}, "q.lora_A.weight: codec 'int8-block64' is none of the wire scheme"),
        ({"delta": False}, "holds absolute values, the plan asked for changes"),
        ({"rotation_block": 63}, "rotation needs blocks of a power of two, got 63"),
    ],
)
def test_header_that_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    bundle = unpack(update())
    assert bundle.wire is not None
    header = dataclasses.replace(bundle.wire, **changes)  # type: ignore[arg-type]  # of any kind
    assert message in refusal(pack(dataclasses.replace(bundle, wire=header)))


def test_absolute_values_are_refused_where_changes_were_asked_for() -> None:
    assert "holds absolute values" in refusal(update(header=None))


def test_changes_are_refused_where_absolute_values_were_asked_for() -> None:
    expected = {n: dataclasses.replace(t, is_change=False) for n, t in EXPECTED.items()}
    assert "holds changes, the plan asked for absolute" in refusal(update(), expected=expected)


def test_bomb_is_refused_by_the_size_of_an_honest_update() -> None:
    limit = largest_update_bytes(EXPECTED)
    big = pack(Bundle({"x": raw(np.zeros(limit, np.float32))}))
    squeezed = pack(wire.compressed(unpack(big)))
    assert len(squeezed) < limit
    assert f"unpack to more than {limit} bytes" in refusal(squeezed)


def test_norm_is_that_of_the_changes() -> None:
    assert "joint norm" in refusal(update(), max_norm=1.0)


@pytest.mark.parametrize("block", [0, 64])
def test_update_that_is_not_finite_is_refused(block: int) -> None:
    bundle = unpack(update(dataclasses.replace(HEADER, rotation_block=block)))
    name = "q.lora_A.weight"
    parts = dict(bundle.tensors[name].parts)
    parts["scale"] = np.full_like(parts["scale"], 0x7F80)
    broken = dataclasses.replace(bundle.tensors[name], parts=parts)
    data = pack(dataclasses.replace(bundle, tensors={**bundle.tensors, name: broken}))
    assert "not finite" in refusal(data)


def test_what_is_expected_survives_the_store() -> None:
    assert expected_from_json(expected_to_json(EXPECTED)) == EXPECTED


def plan_of(folder: Path, codecs: tuple[str, ...] = WIRED, **settings: object) -> Plan:
    return build_plan(
        run_config(folder, **settings),
        ASSIGNMENT,
        TinyChoice(),
        make_space(4).tensors,
        profile(codecs=codecs),
        round_number=3,
        counted_round=1,
    )


ASSIGNMENT = Assignment(
    device_id="d1",
    ranks={f"encoder.layer.{layer}.query": 4 for layer in (0, 1)},
    trained_layers=(0, 1),
    kept_layers=(0, 1),
)


def test_plan_names_the_scheme_with_feedback_below_8_bits(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, codec="int4", codec_options={"rotation_block": 64})
    assert plan.codec == "fp32"
    assert plan.wire == WireScheme(
        codec="int4",
        error_feedback=True,
        rotation_block=64,
        stream=plan.wire.stream if plan.wire else "",
        round=3,
        counted_round=1,
    )
    expected = expected_update(plan, ASSIGNMENT, make_space(4).tensors, classes=len(LABELS))
    assert all(tensor.is_change for tensor in expected.values())

    eight = plan_of(tmp_path, codec="int8-block64").wire
    assert eight is not None
    assert (eight.error_feedback, eight.stochastic, eight.delta) == (False, True, True)
    moving = plan_of(tmp_path, codec="int4", method="flexlora").wire
    assert moving is not None
    assert (moving.error_feedback, moving.stochastic) == (False, True)


def test_plain_codecs_and_old_devices_get_no_scheme(tmp_path: Path) -> None:
    assert plan_of(tmp_path).wire is None
    assert plan_of(tmp_path, codec="fp16").wire is None
    old = plan_of(tmp_path, tuple(CODECS), codec="int4")
    assert (old.wire, old.codec) == (None, "fp32")
    fewer = plan_of(tmp_path, ("fp32", "int4", WIRE_FEATURE), codec="int2")
    assert (fewer.wire, fewer.codec) == (None, "fp32")
    expected = expected_update(old, ASSIGNMENT, make_space(4).tensors, classes=len(LABELS))
    assert not any(tensor.is_change for tensor in expected.values())


def test_two_runs_feed_back_along_streams_of_their_own(tmp_path: Path) -> None:
    first, again, other = (
        wire_scheme(run_config(tmp_path, codec="int4", seed=seed)) for seed in (1, 1, 2)
    )
    assert first is not None
    assert other is not None
    assert first == again
    assert first.stream != other.stream


class WireDevice(Device):
    """A device that sends what its plan's scheme says, with a store for what is left out."""

    residuals: Residuals
    plans: list[Plan]
    sent: list[int]

    def update(self, task) -> bytes:
        plan = plan_from_message(task.plan)
        self.plans.append(plan)
        adapter = read_adapter(self.download(task.adapter))
        trained = train(task, adapter, self.examples)
        data = self.packed(trained)
        if plan.wire is not None:
            encoded = encode_with_feedback(
                trained,
                adapter,
                plan.wire,
                self.residuals,
                seed=plan.seed,
                importance={},
                precision="",
            )
            scalars = {"examples": float(self.examples), "rank": 1.0}
            data = pack(wire.compressed(Bundle(encoded.tensors, scalars, encoded.header)))
        self.sent.append(len(data))
        return data


def run_with(folder: Path, **settings: object) -> tuple[Tensors, list[WireDevice]]:
    """The final adapter of a run of three devices, and the devices."""
    devices = []
    with start_server(server_config(folder / "runs")) as server:
        server.create_run(run_config(folder, rounds=3, **settings))
        for number in range(3):
            device = WireDevice(
                server.address, name=f"installation-{number}", profile=profile(codecs=WIRED)
            )
            device.residuals = Residuals(folder / f"residuals-{number}")
            device.plans, device.sent = [], []
            devices.append(device)
        with Crowd(devices):
            assert server.wait("test", timeout=40.0).state is RunState.FINISHED
    *_, final = final_adapters(folder / "runs" / "test" / "adapter").values()
    return read_adapter(final), devices


@pytest.mark.parametrize(
    ("codec", "largest_error"), [("int8-block64", 0.005), ("int6", 0.02), (ADAPTIVE, 0.01)]
)
def test_run_whose_updates_travel_as_changes_ends_near_one_that_sends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, largest_error: float
) -> None:
    monkeypatch.setattr(wire, "SMALL", 4)  # this model's matrices are tiny
    options = {"budget_bytes": 400} if codec == ADAPTIVE else {}
    whole, _ = run_with(tmp_path / "whole")
    near, devices = run_with(tmp_path / "few", codec=codec, codec_options=options)

    for name, value in whole.items():
        # each of three rounds moves values by about 0.1
        np.testing.assert_allclose(near[name], value, atol=largest_error)
    for device in devices:
        schemes = [plan.wire for plan in device.plans]
        assert [s.round for s in schemes if s] == [0, 1, 2]
        assert [s.counted_round for s in schemes if s] == [None, 0, 1]
