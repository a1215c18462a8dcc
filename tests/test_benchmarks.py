# SPDX-License-Identifier: Apache-2.0
"""The parts of the benchmarks that need no model: what is drawn, compared and planned."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


curves, growth = load("curves"), load("growth")
wire, wire_picture = load("wire"), load("wire_picture")


def curve(
    loss: npt.NDArray[np.float64], stack: str = "onnx", order: int = 0, precision: str = "fp32"
) -> Any:
    return curves.Curve("SST-2", precision, stack, order, tuple(loss), 1.0)


@pytest.mark.parametrize("name", ["curves", "growth"])
def test_a_benchmark_tells_its_options_without_loading_the_compiler(name: str) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--only" in done.stdout


def test_every_epoch_draws_every_example_once_in_an_order_of_its_own() -> None:
    draws = curves.drawn(10, 4, 5, 3).ravel()
    assert sorted(draws) == list(range(20))
    assert list(draws[:10]) != [draw - 10 for draw in draws[10:]]
    assert np.array_equal(draws, curves.drawn(10, 4, 5, 3).ravel())


def test_a_curve_is_within_noise_up_to_the_spread_of_the_orders() -> None:
    level = np.ones(curves.STEPS)
    references = [curve(level * value, curves.REFERENCE) for value in (0.9, 1.0, 1.1)]
    spread = curves.noise(references)
    assert spread == pytest.approx(0.1)
    assert curves.verdict(curve(level * 1.099), references[1], spread)["within_noise"]
    assert not curves.verdict(curve(level * 1.101), references[1], spread)["within_noise"]


def test_one_bad_window_is_enough_to_fall_out_of_the_noise() -> None:
    level = np.ones(curves.STEPS)
    bent = level.copy()
    bent[-curves.WINDOW :] += 0.2
    reference = curve(level, curves.REFERENCE)
    found = curves.verdict(curve(bent), reference, 0.1)
    assert not found["within_noise"]
    assert found["window_deviation_max"] == pytest.approx(0.2)


def test_the_control_starts_one_bit_away_and_keeps_zeros() -> None:
    adapter = {"a": np.array([0.5, -1.5, 0.0], np.float32)}
    moved = curves.last_bit_changed(adapter)["a"]
    assert moved.dtype == np.float32
    assert moved[2] == 0
    assert np.array_equal(np.abs(moved - adapter["a"])[:2] > 0, [True, True])
    assert np.allclose(moved, adapter["a"], rtol=2e-7)


def test_curves_survive_their_file_and_get_their_verdict_in_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    every = [curve(rng.random(curves.STEPS), curves.REFERENCE, order) for order in curves.ORDERS]
    every.append(curve(np.asarray(every[0].loss)))
    every.append(curve(np.asarray(every[0].loss) + 0.25, curves.CONTROL))
    path = tmp_path / "curves.json"
    curves.save_curves(path, {each.key: each for each in every})
    kept = curves.load_curves(path)
    assert list(kept) == [each.key for each in every]
    assert np.allclose(kept[every[2].key].loss, every[2].loss, rtol=1e-6)
    (verdict,) = json.loads(path.read_text())["verdicts"]
    assert verdict["within_noise"] is True
    assert verdict["noise"] > 0
    assert verdict["control_window_deviation_max"] == pytest.approx(0.25)


def test_only_keeps_the_runs_that_every_word_names() -> None:
    runs = curves.wanted(["CLINC150", "nf4", "onnx"], training=True)
    assert [(work.name, *rest) for work, *rest in runs] == [("CLINC150", "nf4", "onnx", 0)]
    stacks = {stack for _, _, stack, _ in curves.wanted([], training=False)}
    assert stacks == {curves.REFERENCE, curves.CONTROL, "onnx", "torch"}


def test_one_setting_moves_at_a_time_and_no_point_is_measured_twice() -> None:
    every = list(growth.points([]))
    assert len(every) == len(set(every))
    for precision in growth.PRECISIONS:
        middle = growth.Point(precision)
        for axis in growth.AXES:
            line = growth.axis_points(axis, precision)
            assert middle in line
            assert {vars(p)[n] for p in line for n in vars(p) if n != axis} == {
                value for name, value in vars(middle).items() if name != axis
            }


def test_a_point_trains_layers_from_the_top_and_keeps_them_from_the_bottom() -> None:
    variant = growth.Point("nf4", trained_layers=2, kept_layers=4, recomputed_layers=2).variant()
    assert variant["lowest_trained_layer"] == 4
    assert variant["kept_layers"] == (0, 1, 2, 3)
    assert variant["recomputed_layers"] == (0, 1)


def federated(scheme: str, seed: int, accuracy: float, size: float) -> dict[str, Any]:
    sizes = {"bytes_up": size, "bytes_down": 2 * size}
    return {"data": "d", "scheme": scheme, "seed": seed, "accuracy": accuracy, **sizes}


def test_schemes_are_compared_with_fp32_seed_by_seed() -> None:
    rows = [
        federated("fp32", 0, 0.80, 100),
        federated("fp32", 1, 0.90, 100),
        federated("int4", 0, 0.79, 10),
        federated("int4", 1, 0.91, 14),
        federated("int4", 2, 0.10, 99),
    ]
    plain, few = wire.summary(rows)
    assert (plain["points_against_fp32"], plain["up_of_fp32"]) == (0, 1)
    assert few["seeds"] == 3
    assert few["points_against_fp32"] == pytest.approx(0)
    assert few["points_sd"] == pytest.approx(2**0.5)
    assert few["up_of_fp32"] == few["down_of_fp32"] == pytest.approx(0.12)
    assert wire_picture.table([few]).splitlines()[-1] == (
        "| d | int4 | 3 | 60.0 ± 43.7 | +0.0 ± 1.4 | 41 (12.0%) | 82 (12.0%) |"
    )


def test_a_scheme_holds_both_ways_within_its_budget() -> None:
    settings = wire.both_ways(wire.budgeted(wire.SCHEMES["adaptive 1/12"], 300))
    assert settings["downlink_codec"] == settings["codec"] == "adaptive"
    assert settings["downlink_options"] == settings["codec_options"] == {"budget_bytes": 100}
    without = wire.both_ways(wire.SCHEMES["int4"])
    assert without["codec_options"] == {"error_feedback": False}
    assert without["downlink_options"] == {}
