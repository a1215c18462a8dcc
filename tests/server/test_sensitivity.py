# SPDX-License-Identifier: Apache-2.0
"""Bits by what the server measured: the weights, and a run whose plans carry them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.server.federation import run_config
from tests.server.test_wire import run_with

from lorikit.proto.plan import ADAPTIVE
from lorikit.proto.tensors import Tensors
from lorikit.quantization import wire
from lorikit.server.app import check_run
from lorikit.server.errors import RequestError
from lorikit.server.sensitivity import sensitivities

SERVER = {"budget_bytes": 400, "importance": "server"}


def adapter() -> Tensors:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((16, 64)).astype(np.float32) for name in "abc"}


def test_weights_are_the_curvatures_of_a_quadratic_loss() -> None:
    start = adapter()
    curvatures = {"a": 8.0, "b": 2.0, "c": 0.0}

    def loss(values: Tensors) -> float:
        return sum(
            weight * float(np.square((values[name] - start[name]).astype(np.float64)).sum())
            for name, weight in curvatures.items()
        )

    found = sensitivities(loss, start, "abc")
    assert found == {"a": 1.0, "b": pytest.approx(0.25), "c": 0.001}


def test_tensor_of_zeros_keeps_the_floor_and_a_blind_sample_weighs_all_alike() -> None:
    start = {**adapter(), "b": np.zeros((16, 64), np.float32)}
    before = start["a"]
    found = sensitivities(lambda values: float(np.square(values["a"] - before).sum()), start, "ab")
    assert found == {"a": 1.0, "b": 0.001}
    assert sensitivities(lambda _: 1.0, start, "ab") == {"a": 1.0, "b": 1.0}


def test_importance_of_the_server_needs_rows_to_measure_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = run_config(tmp_path, codec=ADAPTIVE, codec_options=SERVER, evaluation_data=None)
    with pytest.raises(RequestError) as caught:
        check_run(config)
    assert "importance server needs evaluation_data" in caught.value.detail


def test_plans_carry_weights_that_are_measured_every_few_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SMALL", 4)  # this model's matrices are tiny
    _, devices = run_with(tmp_path, codec=ADAPTIVE, codec_options=SERVER, sensitivity_every=2)
    for device in devices:
        weights = [plan.wire.sensitivity for plan in device.plans if plan.wire is not None]
        assert len(weights) == 3
        assert weights[0] == weights[1]
        for each in weights:
            # the tiny model's loss hangs on its head alone
            assert set(each.values()) <= {1.0, 0.001}
            assert "classifier.weight" in each
