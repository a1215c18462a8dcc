# SPDX-License-Identifier: Apache-2.0
"""Updates leave as changes; what they leave out comes along later, once, whatever happens."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.wire_rounds import rounds

from lorikit.proto.plan import WireScheme
from lorikit.proto.tensors import Float32, Tensors
from lorikit.quantization import wire
from lorikit.sdk._errors import NonFiniteError, PlanRefusedError
from lorikit.sdk._store import Residuals
from lorikit.sdk._wire import (
    FEEDBACK_DECAY,
    FEEDBACK_ROUNDS,
    WireTensors,
    check_scheme,
    encode_tensors,
    encode_with_feedback,
)

A, B, BIAS = "q.lora_A.weight", "q.lora_B.weight", "classifier.bias"


def normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Float32:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def received() -> Tensors:
    return {A: normal((8, 96), 1), B: normal((96, 8), 2), BIAS: normal((5,), 3)}


def trained(seed: int = 10) -> Tensors:
    return {n: v + normal(v.shape, seed + i, 0.01) for i, (n, v) in enumerate(received().items())}


def scheme(number: int = 0, counted: int | None = None, **changes: object) -> WireScheme:
    base = WireScheme(
        codec="int1", error_feedback=True, stream="run", round=number, counted_round=counted
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # of any kind


def encoded(
    wanted: WireScheme,
    residuals: Residuals | None = None,
    tensors: Tensors | None = None,
    precision: str = "int8",
    **importance: float,
) -> WireTensors:
    return encode_with_feedback(
        trained() if tensors is None else tensors,
        received(),
        wanted,
        residuals,
        seed=5,
        importance={A: importance.get("a", 1.0), B: importance.get("b", 1.0)},
        precision=precision,
    )


def decoded(update: WireTensors) -> Tensors:
    return {n: wire.decode(e, n, update.header) for n, e in update.tensors.items()}


@pytest.fixture
def residuals(tmp_path: Path) -> Residuals:
    return Residuals(tmp_path / "residuals")


def test_changes_travel_and_the_rest_is_what_they_lack() -> None:
    update = encoded(scheme())
    sent = decoded(update)

    for name, before in received().items():
        change = trained()[name] - before
        np.testing.assert_array_equal(update.left[name], change - sent[name])
    assert {n: e.codec for n, e in update.tensors.items()} == {A: "int1", B: "int1", BIAS: "fp16"}
    assert update.header.delta
    assert update.header.seed == 5


def test_four_bits_of_a_change_are_worth_far_more_than_four_bits_of_the_value() -> None:
    def error(delta: bool) -> float:
        wanted = scheme(codec="int4", delta=delta, error_feedback=False)
        sent = decoded(encoded(wanted))
        whole = {n: sent[n] + received()[n] if delta else sent[n] for n in (A, B)}
        return sum(float(np.square(whole[n] - trained()[n]).sum()) for n in whole)

    assert error(delta=True) < error(delta=False) / 1000


def test_pruned_tensor_is_compared_with_the_first_part() -> None:
    pruned = {A: received()[A][:7] + 1, B: received()[B][:, :7] - 1}
    sent = decoded(encoded(scheme(), tensors=pruned))

    np.testing.assert_allclose(sent[A], 1.0, rtol=0.01)
    np.testing.assert_allclose(sent[B], -1.0, rtol=0.01)


def test_rest_of_the_counted_round_is_added_once(residuals: Residuals) -> None:
    first = encoded(scheme(0), residuals)
    second = encoded(scheme(1, counted=0), residuals)

    for name in (A, B):
        change = trained()[name] - received()[name]
        total = decoded(second)[name] + second.left[name]
        np.testing.assert_allclose(total, change + first.left[name], atol=1e-7)


def test_update_that_did_not_count_leaves_no_trace(residuals: Residuals) -> None:
    encoded(scheme(0), residuals)
    encoded(scheme(1, counted=0), residuals, trained(50))
    late = encoded(scheme(2, counted=0), residuals)

    fading = np.float32(FEEDBACK_DECAY)
    first = encoded(scheme(0), None)
    for name in (A, B):
        change = trained()[name] - received()[name]
        total = decoded(late)[name] + late.left[name]
        np.testing.assert_allclose(total, change + fading * first.left[name], atol=1e-7)


def test_repeating_a_round_gives_the_same_bytes_and_rest(residuals: Residuals) -> None:
    encoded(scheme(0), residuals)
    first = encoded(scheme(1, counted=0), residuals)
    again = encoded(scheme(1, counted=0), residuals)

    for name in (A, B, BIAS):
        np.testing.assert_array_equal(first.left[name], again.left[name])
        for role, part in first.tensors[name].parts.items():
            np.testing.assert_array_equal(part, again.tensors[name].parts[role])


def test_missed_rounds_fade_the_rest_and_many_forget_it(residuals: Residuals) -> None:
    first = encoded(scheme(0), residuals)
    for missed in (0, 1, 5, FEEDBACK_ROUNDS, FEEDBACK_ROUNDS + 1):
        later = encoded(scheme(1 + missed, counted=0), residuals)
        fading = FEEDBACK_DECAY**missed if missed <= FEEDBACK_ROUNDS else 0
        change = trained()[A] - received()[A]
        total = decoded(later)[A] + later.left[A]
        np.testing.assert_allclose(total, change + fading * first.left[A], atol=1e-7)


def test_rest_of_another_shape_scheme_base_or_stream_is_dropped(residuals: Residuals) -> None:
    encoded(scheme(0), residuals)
    fresh = encoded(scheme(0), None)
    fresh_int2 = encoded(scheme(0, codec="int2"), None)

    other_base = encoded(scheme(1, counted=0), residuals, precision="nf4")
    other_codec = encoded(scheme(1, counted=0, codec="int2"), residuals)
    other_stream = encoded(scheme(1, counted=0, stream="another"), residuals)
    np.testing.assert_array_equal(decoded(other_base)[A], decoded(fresh)[A])
    np.testing.assert_array_equal(decoded(other_codec)[A], decoded(fresh_int2)[A])
    np.testing.assert_array_equal(decoded(other_stream)[A], decoded(fresh)[A])


def test_pruning_drops_the_rest_of_the_tensors_it_shortens(residuals: Residuals) -> None:
    encoded(scheme(0), residuals)
    pruned = {A: trained()[A][:7], B: trained()[B]}
    update = encoded(scheme(1, counted=0), residuals, pruned)

    change = pruned[A] - received()[A][:7]
    np.testing.assert_allclose(decoded(update)[A] + update.left[A], change, atol=1e-7)
    kept = trained()[B] - received()[B] + encoded(scheme(0), None).left[B]
    np.testing.assert_allclose(decoded(update)[B] + update.left[B], kept, atol=1e-7)


def test_rest_of_a_tensor_that_rests_a_round_is_kept(residuals: Residuals) -> None:
    first = encoded(scheme(0), residuals)
    encoded(scheme(1, counted=0), residuals, {B: trained()[B]})
    third = encoded(scheme(2, counted=1), residuals, {A: trained()[A]})

    change = trained()[A] - received()[A]
    np.testing.assert_allclose(decoded(third)[A] + third.left[A], change + first.left[A], atol=1e-7)


def test_store_keeps_two_rounds_of_eight_streams(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path / "residuals")
    for stream in range(12):
        for number in range(5):
            counted = number - 1 if number else None
            encoded(scheme(number, counted, stream=str(stream)), residuals)
    folders = list((tmp_path / "residuals").iterdir())
    assert len(folders) == 8
    assert {len(list(folder.iterdir())) for folder in folders} == {2}


def test_damaged_rest_counts_as_absent(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path / "residuals")
    encoded(scheme(0), residuals)
    (path,) = (tmp_path / "residuals").glob("*/0")
    path.write_bytes(path.read_bytes()[:-1])

    again = encoded(scheme(1, counted=0), residuals)
    np.testing.assert_array_equal(decoded(again)[A], decoded(encoded(scheme(0), None))[A])


def test_killed_device_neither_loses_nor_doubles_its_rest(tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    calm.mkdir()
    rounds(calm, 4)

    def start(folder: Path, place: int) -> int:
        command = [sys.executable, "-m", "tests.sdk.wire_rounds", str(folder), "4", str(place)]
        return subprocess.run(command, check=False).returncode

    hurt = tmp_path / "hurt"
    hurt.mkdir()
    # each start dies around its first, second ... replacement: of the rest, the adapter, the state
    for place in (1, -1, 2, -2, 3, -3, 5):
        assert start(hurt, place) in (-signal.SIGKILL, 0)
    assert start(hurt, 0) == 0

    assert (hurt / "adapter-4").read_bytes() == (calm / "adapter-4").read_bytes()


def federated_error(rounds_: int, *, feedback: bool) -> float:
    """Distance of 1-bit rounds from the optimum of a federated quadratic, over its start's."""
    rng = np.random.default_rng(0)
    optima = rng.standard_normal((4, 16, 48)).astype(np.float32) * 3
    best = optima.mean(axis=0)
    adapter = {"w": np.zeros((16, 48), np.float32)}
    rests: list[Tensors] = [{} for _ in optima]
    distances = []
    for number in range(rounds_):
        changes = []
        for device, optimum in enumerate(optima):
            moved = {"w": adapter["w"] + np.float32(0.05) * (optimum - adapter["w"])}
            wanted = scheme(number, error_feedback=feedback)
            update = encode_tensors(
                moved, adapter, wanted, seed=device, importance={}, carried=rests[device]
            )
            rests[device] = update.left if feedback else {}
            changes.append(wire.decode(update.tensors["w"], "w", update.header))
        adapter = {"w": adapter["w"] + np.mean(changes, axis=0)}
        distances.append(np.linalg.norm(adapter["w"] - best) / np.linalg.norm(best))
    return float(np.mean(distances[-50:]))


def test_one_bit_converges_with_feedback_and_not_without() -> None:
    assert federated_error(400, feedback=True) < 0.1
    assert federated_error(400, feedback=False) > 0.5


def test_adaptive_keeps_its_budget_and_spends_it_where_it_matters() -> None:
    for budget in (100, 300, 600, 1200, 4000):
        wanted = scheme(codec="adaptive", budget_bytes=budget, error_feedback=False)
        update = encoded(wanted, a=100.0, b=0.01)
        assert sum(each.nbytes for each in update.tensors.values()) <= budget
        errors = {n: float(np.square(update.left[n]).sum()) for n in (A, B)}
        assert update.tensors[A].nbytes >= update.tensors[B].nbytes
        assert errors[A] < errors[B] or budget == 4000
    assert {update.tensors[n].codec for n in (A, B)} == {"int8-block64"}


def test_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(PlanRefusedError, match=r"wire\.budget_bytes"):
        encoded(scheme(codec="adaptive", budget_bytes=10))


def test_top_share_decides_how_much_is_kept() -> None:
    few, many = (
        encoded(scheme(codec="topk", top_share=share)).tensors[A].parts["codes"].size
        for share in (0.01, 0.25)
    )
    assert (few, many) == (8, 192)


def test_unknown_scheme_is_refused_before_any_work() -> None:
    with pytest.raises(PlanRefusedError, match=r"unknown wire scheme 'int9'.*update the app"):
        check_scheme(scheme(codec="int9"))


def test_change_that_is_not_finite_is_refused_by_name() -> None:
    broken = trained()
    broken[B][3, 3] = np.inf
    with pytest.raises(NonFiniteError, match=r"q\.lora_B\.weight: its change is not finite"):
        encoded(scheme(), tensors=broken)
