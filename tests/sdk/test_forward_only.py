# SPDX-License-Identifier: Apache-2.0
"""Training without gradients: directions both ends can make, slopes, replay, and a falling loss."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import (
    BIAS,
    HEAD,
    INPUTS,
    A,
    B,
    TinyPackage,
    build_tiny_package,
)
from tests.sdk.test_plan import Device, Dying

from lorikit.proto.directions import SEED_SCALARS, direction, replayed
from lorikit.proto.plan import Operation, OptimizerConfig, Phase, Plan
from lorikit.proto.tensors import Tensors, pack
from lorikit.quantization import codec
from lorikit.sdk._errors import PlanRefusedError
from lorikit.sdk._forward_only import drawn_directions, moves, perturbed, slope
from lorikit.sdk._plan import Outcome
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines.base import Evaluation

pytest.importorskip("onnxruntime", reason="plans run on the onnx engine")

ALL = (A, B, HEAD, BIAS)
MEZO = OptimizerConfig(name="mezo", learning_rate=0.01, directions=2)
PHASE = Phase(train=ALL, steps=5, batch_size=6, micro_batch=4, optimizer=MEZO, seed=3)
PLAN = Plan(method="forward", inputs=INPUTS, phases=(PHASE,), max_length=16, seed=11)


def _decoded(outcome: Outcome) -> Tensors:
    tensors = outcome.bundle.tensors
    return {name: codec(each.codec).decode(each) for name, each in tensors.items()}


def test_direction_is_the_same_wherever_it_is_made() -> None:
    signs = direction(7, 3, "layer.weight", (2, 5))
    # PCG64 and its seeding are specified bit for bit; these are the low bits of its first word.
    assert signs.dtype == np.float32
    first = bytes.fromhex(hashlib.sha256(b"layer.weight").hexdigest())[:8]
    key = sum(byte << 8 * n for n, byte in enumerate(first))
    word = int(np.random.PCG64(np.random.SeedSequence([7, 3, key])).random_raw())
    assert signs.reshape(-1).tolist() == [2.0 * (word >> n & 1) - 1 for n in range(10)]


def test_directions_of_other_numbers_names_and_seeds_are_independent() -> None:
    size = 10_000
    one = direction(7, 3, "a", (size,))
    for other in (direction(8, 3, "a", (size,)), direction(7, 4, "a", (size,)),
                  direction(7, 3, "b", (size,))):  # fmt: skip
        # The mean of independent signs deviates by 1 / sqrt(size); five times that is rare.
        assert abs(float((one * other).mean())) < 5 / np.sqrt(size)
    assert abs(float(one.mean())) < 5 / np.sqrt(size)


def test_every_direction_of_a_phase_is_another_and_a_pool_is_shared() -> None:
    fresh = [n for step in range(4) for n in drawn_directions(PHASE, step)]
    assert fresh == list(range(8))
    pool = dataclasses.replace(PHASE, optimizer=dataclasses.replace(MEZO, seeds=5))
    drawn = [n for step in range(50) for n in drawn_directions(pool, step)]
    assert set(drawn) == set(range(5))
    assert drawn == [n for step in range(50) for n in drawn_directions(pool, step)]


def test_slope_along_a_direction_is_the_gradients_part_of_it() -> None:
    # loss(w) = |w|^2 / 2 has gradient w; central differences are exact for it.
    value = np.array([0.5, -0.25, 0.75], np.float32)
    phase = Phase(train=("w",), steps=1, batch_size=1, micro_batch=1,
                  optimizer=dataclasses.replace(MEZO, perturbation=0.25))  # fmt: skip
    signs = direction(phase.seed, 9, "w", (3,))

    found, mean = slope(
        lambda t: Evaluation(float((t["w"] ** 2).sum()) / 2, 0.0), {"w": value}, phase, 9
    )

    assert found == pytest.approx(float(value @ signs))
    # The two losses lie above that of w by eps^2 |z|^2 / 2.
    assert mean.loss == pytest.approx(float(value @ value) / 2 + 0.25**2 * 3 / 2)


def test_only_the_phases_tensors_are_perturbed() -> None:
    adapter = {A: np.zeros((2, 3), np.float32), B: np.ones(2, np.float32)}
    phase = dataclasses.replace(PHASE, train=(A,))
    after = perturbed(adapter, phase, 0, 0.5)
    assert after[B] is adapter[B]
    assert set(np.abs(after[A]).reshape(-1)) == {0.5}
    np.testing.assert_array_equal(adapter[A], 0)


def test_moves_go_against_the_slopes_and_share_the_rate() -> None:
    assert moves([(4, 2.0), (5, -1.0)], 0.5) == [(4, -0.5), (5, 0.25)]


def test_mean_estimate_approaches_the_true_gradient(tmp_path: Path) -> None:
    package = build_tiny_package(tmp_path)
    engine = open_engine("onnx", package.manifest, tmp_path, threads=1)
    adapter, batch = package.adapter(), package.batch((5, 3, 4))
    truth = package.reference(adapter, batch).gradients
    count = 1500
    phase = dataclasses.replace(PHASE, optimizer=dataclasses.replace(MEZO, perturbation=0.01))
    total = {name: np.zeros(value.shape) for name, value in truth.items()}
    for number in range(count):
        found, _ = slope(lambda t: engine.loss(t, batch, INPUTS), adapter, phase, number)
        for name, estimate in total.items():
            estimate += found * direction(phase.seed, number, name, estimate.shape) / count
    joint = np.concatenate([truth[name].reshape(-1) for name in truth]).astype(np.float64)
    mean = np.concatenate([total[name].reshape(-1) for name in truth])
    # The mean of n estimates is off by |g| sqrt((d - 1) / n) for d numbers (Spall 1992).
    expected = np.linalg.norm(joint) * np.sqrt((joint.size - 1) / count)
    assert np.linalg.norm(mean - joint) == pytest.approx(expected, rel=0.25)
    assert mean @ joint == pytest.approx(joint @ joint, rel=0.2)


def test_replayed_seeds_and_scalars_give_the_adapter_bit_for_bit(tmp_path: Path) -> None:
    device = Device(tmp_path)
    phase = dataclasses.replace(PHASE, learning_rate_factors={"head": 3.0})
    outcome = device.run(dataclasses.replace(PLAN, phases=(phase,), send=(*ALL, SEED_SCALARS)))
    sent = _decoded(outcome)
    pairs = [(int(number), float(distance)) for number, distance in sent.pop(SEED_SCALARS)]

    again = replayed(
        device.package.adapter(), pairs, phase_seed=phase.seed, factors={HEAD: 3.0, BIAS: 3.0}
    )

    assert [number for number, _ in pairs] == list(range(10))
    for name in ALL:
        np.testing.assert_array_equal(again[name], sent[name])
        assert not np.array_equal(sent[name], device.package.adapter()[name])


def test_loss_goes_down_without_gradients(tmp_path: Path) -> None:
    device = Device(tmp_path)
    optimizer = OptimizerConfig(name="mezo", learning_rate=0.05, directions=4)
    phase = dataclasses.replace(PHASE, steps=150, batch_size=20, optimizer=optimizer)
    report = device.run(dataclasses.replace(PLAN, phases=(phase,))).report
    assert report.last_loss < 0.6 * report.first_loss
    assert report.examples == 150 * 20


@pytest.mark.parametrize("runs", [1, 9, 30])
def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path, runs: int) -> None:
    plan = dataclasses.replace(PLAN, send=(*ALL, SEED_SCALARS))
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Device(tmp_path / "whole").run(plan)
    killed = Device(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.executor(Dying(killed.engine(), runs), journal_interval_steps=1).run(
            plan, killed.package.adapter(), "task-1"
        )
    assert pack(Device(tmp_path / "killed").run(plan).bundle) == pack(whole.bundle)


def test_forward_graph_gives_the_loss_of_the_training_graph(tmp_path: Path) -> None:
    every = build_tiny_package(tmp_path, graphs=("train", "predict", "evaluate"))
    adapter, batch = every.adapter(), every.batch((5, 3))
    engine = open_engine("onnx", every.manifest, tmp_path, threads=1)
    expected = every.reference(adapter, batch)
    result = engine.loss(adapter, batch, INPUTS)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.correct == expected.correct


def _without_training_graph(folder: Path) -> TinyPackage:
    return build_tiny_package(folder, graphs=("evaluate", "predict"))


def test_package_without_a_training_graph_can_be_trained_forward_only(tmp_path: Path) -> None:
    device = Device(tmp_path)
    with_graph = _decoded(device.run(PLAN))
    (tmp_path / "other").mkdir()
    other = Device(tmp_path / "other")
    other.package = _without_training_graph(tmp_path / "other")
    without = _decoded(other.run(PLAN))
    for name in ALL:
        # The same arithmetic in two graphs.
        np.testing.assert_allclose(without[name], with_graph[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(PlanRefusedError, match="needs a graph 'train'"):
        other.run(dataclasses.replace(PLAN, phases=(dataclasses.replace(
            PHASE, optimizer=OptimizerConfig()),)))  # fmt: skip


def test_penalty_counts_in_the_loss(tmp_path: Path) -> None:
    penalty = Operation(name="tail_penalty", arguments={"weight": 5.0, "keep": 0.5, "min_rank": 1})
    plain = Device(tmp_path).run(PLAN).report.first_loss
    (tmp_path / "other").mkdir()
    phase = dataclasses.replace(PHASE, gradient_operations=(penalty,))
    plan = dataclasses.replace(PLAN, phases=(phase,))
    assert Device(tmp_path / "other").run(plan).report.first_loss > plain + 0.1


def test_scalars_are_no_part_of_a_plan_with_gradients(tmp_path: Path) -> None:
    phase = dataclasses.replace(PHASE, optimizer=OptimizerConfig())
    plan = dataclasses.replace(PLAN, phases=(phase,), send=(SEED_SCALARS,))
    with pytest.raises(PlanRefusedError, match=f"sends {SEED_SCALARS}"):
        Device(tmp_path).run(plan)
