# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant, State
from lorikit.server.methods.fedra import FedRA, FedRAConfig, draw, repair, slots

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]


def rows(*layers: str) -> np.ndarray:
    return np.array([[mark == "x" for mark in row] for row in layers])


def test_slots_are_positions_among_the_kept_layers() -> None:
    assert slots(rows("x.xx.x")[0]).tolist() == [0, -1, 1, 2, -1, 3]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_every_device_gets_as_many_layers_as_it_can_hold(capacities: list[int], seed: int) -> None:
    for config in (FedRAConfig(), FedRAConfig(layout="window"), FedRAConfig(keep_last=True)):
        drawn = draw(capacities, 6, np.random.default_rng(seed), config)

        assert drawn.sum(axis=1).tolist() == capacities
        assert drawn[:, 5].all() or not config.keep_last


def test_layers_are_drawn_uniformly() -> None:
    drawn = draw([2] * 6000, 6, np.random.default_rng(0), FedRAConfig())

    # 2000 expected, standard deviation sqrt(6000 / 3 * 2 / 3) = 37
    assert np.abs(drawn.sum(axis=0) - 2000).max() < 5 * 37


def test_a_window_is_a_run_of_neighbours() -> None:
    drawn = draw([3] * 200, 6, np.random.default_rng(0), FedRAConfig(layout="window"))

    starts = [int(np.flatnonzero(row)[0]) for row in drawn]
    assert all(row[first : first + 3].all() for row, first in zip(drawn, starts, strict=True))
    assert set(starts) == {0, 1, 2, 3}


def test_a_window_beside_the_last_block() -> None:
    config = FedRAConfig(layout="window", keep_last=True)

    drawn = draw([3] * 200, 6, np.random.default_rng(0), config)

    assert {tuple(np.flatnonzero(row).tolist()) for row in drawn} == {
        (0, 1, 5), (1, 2, 5), (2, 3, 5), (3, 4, 5),
    }  # fmt: skip


def test_repair_by_hand() -> None:
    # layer 3 is missing; rows 0 and 1 have two layers that others hold too, row 2 one;
    # row 0 comes first and gives layer 0, which all three hold
    before = rows("xx..", "xx..", "x.x.")

    assert np.array_equal(repair(before), rows(".x.x", "xx..", "x.x."))
    assert np.array_equal(before, rows("xx..", "xx..", "x.x."))


def test_repair_spares_what_it_is_told_to() -> None:
    assert np.array_equal(repair(rows("x..x", ".x.x"), fixed=(3,)), rows("x..x", ".x.x"))
    assert np.array_equal(repair(rows("x..x", "x..x"), fixed=(3,)), rows(".x.x", "x..x"))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_repair_keeps_capacities_and_leaves_no_layer_out_where_it_can(
    capacities: list[int], seed: int
) -> None:
    repaired = repair(draw(capacities, 6, np.random.default_rng(seed), FedRAConfig()))

    assert repaired.sum(axis=1).tolist() == capacities
    assert int(repaired.any(axis=0).sum()) == min(6, sum(capacities))


def test_kept_layers_train_and_nothing_else_travels(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = FedRA()
    state = method.start(space, initial)
    cohort = [device(f"d{i}", max_layers=1 + i) for i in range(4)]

    work = method.assign(state, space, 0, cohort, np.random.default_rng(0))

    for count, assignment in enumerate(work, start=1):
        assert len(assignment.kept_layers) == count
        assert (
            assignment.trained_layers
            == assignment.kept_layers
            == tuple(sorted(assignment.kept_layers))
        )
        sent = method.broadcast(state, space, assignment)
        layers = {t.layer for t in space.tensors if t.name in sent}
        assert layers == {-1, *assignment.kept_layers}


def test_layers_change_from_round_to_round(space: AdapterSpace, device: Devices) -> None:
    rng = np.random.default_rng(0)
    seen = {
        FedRA().assign(State(tensors={}), space, r, [device("a", max_layers=2)], rng)[0].kept_layers
        for r in range(40)
    }

    assert len(seen) == 6  # two of four layers


@pytest.mark.parametrize("weighting", ["data", "uniform"])
def test_layers_are_averaged_over_holders_and_the_head_over_all(
    weighting: str,
    space: AdapterSpace,
    initial: Tensors,
    device: Devices,
    trainer: Trainer,
) -> None:
    method = FedRA(FedRAConfig(weighting=weighting))  # type: ignore[arg-type]  # parametrized
    state = method.start(space, initial)
    cohort = [device(f"d{i}", max_layers=2) for i in range(3)]
    work = method.assign(state, space, 0, cohort, np.random.default_rng(2))
    updates = [
        trainer(method, state, space, a, examples=n, seed=n)
        for a, n in zip(work, (10, 20, 40), strict=True)
    ]

    after = method.aggregate(state, space, updates)

    holders = [sum(layer in a.kept_layers for a in work) for layer in range(4)]
    assert sorted(holders) == [0, 1, 2, 3]  # so that every case occurs
    for tensor in space.tensors:
        held = [u for u in updates if tensor.name in u.tensors]
        weights = [float(u.examples) if weighting == "data" else 1.0 for u in held]
        wanted = (
            np.average([u.tensors[tensor.name] for u in held], axis=0, weights=weights)
            if held
            else state.tensors[tensor.name]
        )
        np.testing.assert_allclose(after.tensors[tensor.name], wanted, rtol=1e-5, atol=1e-6)


def test_capacities_can_follow_budgets(space: AdapterSpace, device: Devices) -> None:
    method = FedRA(FedRAConfig(capacity="budget"))
    cohort = [device(f"d{i}", memory_limit_bytes=b) for i, b in enumerate((800, 400, 100, 1))]
    cohort.append(device("small", memory_limit_bytes=800, max_layers=2))

    work = method.assign(State(tensors={}), space, 0, cohort, np.random.default_rng(0))

    assert [len(a.kept_layers) for a in work] == [4, 2, 1, 1, 2]
    spread = FedRA(FedRAConfig(capacity="budget", budget_exponent=0.5))
    work = spread.assign(State(tensors={}), space, 0, cohort, np.random.default_rng(0))
    assert [len(a.kept_layers) for a in work] == [4, 3, 1, 1, 2]  # 4 / sqrt(2) = 2.8


def test_repair_gives_every_layer_a_holder(space: AdapterSpace, device: Devices) -> None:
    method = FedRA(FedRAConfig(unused="repair"))
    cohort = [device("a", max_layers=2), device("b", max_layers=2)]

    for seed in range(20):
        work = method.assign(State(tensors={}), space, 0, cohort, np.random.default_rng(seed))
        assert sorted(layer for a in work for layer in a.kept_layers) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": "all"},
        {"layout": "even"},
        {"unused": "drop"},
        {"weighting": "norm"},
        {"rank": -1},
        {"min_layers": 0},
        {"reference_bytes": -5},
        {"budget_exponent": -0.5},
    ],
)
def test_bad_options_are_refused_with_their_value(options: dict[str, object]) -> None:
    [value] = options.values()
    with pytest.raises(ValueError, match=str(value)):
        FedRAConfig(**options)  # type: ignore[arg-type]  # wrong on purpose


def test_windows_cannot_be_repaired() -> None:
    with pytest.raises(ValueError, match="use layout='random'"):
        FedRAConfig(layout="window", unused="repair")
