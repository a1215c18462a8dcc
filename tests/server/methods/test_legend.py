# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant, State
from lorikit.server.methods.legend import (
    Legend,
    LegendConfig,
    Timing,
    arithmetic_ranks,
    assign_depths,
    halving_ranks,
    layer_ranks,
)

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("budget", "layers", "expected"),
    [
        (270, 12, list(range(17, 29))),
        (39, 6, [4, 5, 6, 7, 8, 9]),
        (192, 6, [29, 30, 31, 33, 34, 35]),
        (6, 6, [1, 2, 3, 4, 5, 6]),  # too small for a step of 1: r_0 is 1 all the same
    ],
)
def test_ranks_rise_towards_the_output(budget: int, layers: int, expected: list[int]) -> None:
    assert arithmetic_ranks(budget, layers) == expected


def test_a_step_of_zero_spreads_the_budget_evenly() -> None:
    assert arithmetic_ranks(26, 4, 0) == [6, 6, 7, 7]


def test_ranks_halve_from_the_output() -> None:
    assert halving_ranks(192, 6) == [6, 6, 12, 24, 48, 96]
    assert halving_ranks(4, 6) == [1, 1, 1, 1, 1, 2]


def test_the_default_budget_ends_at_the_largest_rank() -> None:
    assert layer_ranks(LegendConfig(), 6, 8) == [3, 4, 5, 6, 7, 8]
    assert layer_ranks(LegendConfig(), 6, 3) == [1, 1, 1, 1, 2, 3]
    assert layer_ranks(LegendConfig(distribution="halving"), 4, 8) == [2, 2, 4, 8]
    assert layer_ranks(LegendConfig(distribution="halving"), 1, 8) == [8]


def test_a_budget_above_the_largest_rank_is_refused(space: AdapterSpace, initial: Tensors) -> None:
    with pytest.raises(ValueError, match="rank 9, above the run's largest rank 6"):
        Legend(LegendConfig(rank_budget=30)).start(space, initial)


@pytest.mark.parametrize(("layers", "depths"), [(12, [12, 8, 3]), (6, [6, 4, 1])])
def test_depths_follow_speed_until_devices_wait_little(layers: int, depths: list[int]) -> None:
    devices = [
        Timing(forward=0.4 * full, per_layer=0.6 * full / layers, limit=layers)
        for full in (1, 1.4, 2.6)
    ]

    assert assign_depths(devices, [1] * layers, LegendConfig(max_waiting_seconds=0.3)) == depths


def test_the_least_waiting_seen_counts_where_no_spread_meets_the_bound() -> None:
    devices = [Timing(forward=f, per_layer=0.1, limit=4) for f in (1.0, 100.0)]

    depths = assign_depths(devices, [1] * 4, LegendConfig(max_waiting_seconds=0.01))

    assert depths == [4, 1]  # gap 3: the slow device saves 0.3 s of 100


def test_memory_and_upload_deadline_limit_depth(space: AdapterSpace, device: Devices) -> None:
    method = Legend(LegendConfig(upload_deadline_seconds=10, max_waiting_share=10))
    cohort = [
        device("memory", max_depth=1),
        device("network", upload_seconds_per_rank=1.0),  # ranks 3 4 5 6: 6 s, 11 s, ...
        device("free"),
        device("none", upload_seconds_per_rank=2.0),
    ]

    work = method.assign(State(tensors={}), space, 0, cohort, RNG)

    assert [a.trained_layers for a in work] == [(3,), (3,), (0, 1, 2, 3), ()]
    assert all(a.kept_layers == (0, 1, 2, 3) for a in work)


def test_upload_time_counts_as_waiting() -> None:
    timing = Timing(forward=1.0, per_layer=0.5, upload_per_rank=0.1, limit=3)

    assert timing.round_seconds(2, [4, 5, 6], 10) == pytest.approx(10 * (1 + 2 * 0.5) + 0.1 * 11)
    assert timing.round_seconds(0, [4, 5, 6], 10) == 10


def test_depths_are_kept_until_they_are_assigned_anew(space: AdapterSpace, device: Devices) -> None:
    method = Legend(LegendConfig(reassign_every=10))
    state = State(tensors={}, devices={"a": {"depth": 2.0}})
    cohort = [device("a"), device("b"), device("c", max_depth=1)]

    kept = method.assign(state, space, 9, cohort, RNG)
    anew = method.assign(state, space, 10, cohort, RNG)

    assert [len(a.trained_layers) for a in kept] == [2, 4, 1]
    assert [len(a.trained_layers) for a in anew] == [4, 4, 1]


def test_each_layer_is_averaged_over_those_who_trained_it(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = Legend(LegendConfig(max_waiting_share=10))
    state = method.start(space, initial)
    cohort = [device("deep", max_depth=3), device("shallow", max_depth=1)]
    deep, shallow = (
        trainer(method, state, space, a, examples=n, seed=n)
        for a, n in zip(method.assign(state, space, 0, cohort, RNG), (30, 10), strict=True)
    )

    after = method.aggregate(state, space, [deep, shallow])

    for tensor in space.tensors:
        name = tensor.name
        if tensor.layer == 0:
            wanted = state.tensors[name]
        elif tensor.layer in (1, 2):
            wanted = deep.tensors[name]
        else:
            wanted = 0.75 * deep.tensors[name] + 0.25 * shallow.tensors[name]
        np.testing.assert_allclose(after.tensors[name], wanted, rtol=1e-6, atol=1e-6)
    assert after.devices == {"deep": {"depth": 3.0}, "shallow": {"depth": 1.0}}


def test_each_layer_has_one_rank_on_every_device(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = Legend()
    state = method.start(space, initial)
    work = method.assign(state, space, 0, [device("a"), device("b", max_depth=1)], RNG)

    for assignment in work:
        sent = method.broadcast(state, space, assignment)
        for a, b in space.pairs():
            assert sent[a.name].shape[0] == sent[b.name].shape[1] == a.layer + 3


def test_own_layers_alone_can_be_sent(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = Legend(LegendConfig(download="own"))
    state = method.start(space, {n: v + 1 for n, v in initial.items()})
    [assignment] = method.assign(state, space, 0, [device("a", max_depth=2)], RNG)

    sent = method.broadcast(state, space, assignment)

    for a, b in space.pairs():
        product = sent[b.name] @ sent[a.name]
        assert sent[a.name].shape[0] == (1 if a.layer < 2 else a.layer + 3)
        assert product.any() == (a.layer >= 2)


def test_reported_times_are_smoothed_and_change_the_next_depths(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = Legend(LegendConfig(smoothing=0.8, weighting="uniform"))
    state = method.start(space, initial)
    cohort = [device("a"), device("b")]
    for seconds in (1.0, 6.0):
        work = method.assign(state, space, 1, cohort, RNG)
        updates = [
            trainer(method, state, space, a, seconds_per_step=s, upload_seconds=u)
            for a, s, u in zip(work, (seconds, 1.0), (0.0, 36.0), strict=True)
        ]
        state = method.aggregate(state, space, updates)

    assert state.devices["a"]["seconds_per_step"] == pytest.approx(0.8 * 1 + 0.2 * 6)
    assert "upload_seconds_per_rank" not in state.devices["a"]
    assert state.devices["b"]["upload_seconds_per_rank"] == pytest.approx(36 / (3 + 4 + 5 + 6))
    slow = replace(state, devices={"a": {"depth": 4.0, "seconds_per_step": 9.0}})
    strict = Legend(LegendConfig(max_waiting_seconds=1e-9))
    work = strict.assign(slow, space, 10, cohort, RNG)
    assert [len(a.trained_layers) for a in work] == [1, 4]


def test_a_time_at_another_depth_starts_a_new_estimate(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = Legend()
    state = method.start(space, initial)
    state = replace(state, devices={"a": {"depth": 2.0, "seconds_per_step": 9.0}})
    [work] = method.assign(state, space, 0, [device("a")], RNG)

    after = method.aggregate(
        state, space, [trainer(method, state, space, work, seconds_per_step=1.0)]
    )

    assert after.devices["a"] == {"depth": 4.0, "seconds_per_step": 1.0}


def test_a_time_measured_shallow_is_stretched_to_full_depth(
    space: AdapterSpace, device: Devices
) -> None:
    method = Legend(LegendConfig(max_waiting_seconds=1e-9))
    # at depth 2 of 4 a step takes 1/3 + 2/3 * 1/2 = 2/3 of the full time: 2 s means 3 s
    state = State(tensors={}, devices={"a": {"depth": 2.0, "seconds_per_step": 2.0}})

    timing = method._timing(state, space, device("a"))

    assert timing.round_seconds(4, [1] * 4, 1) == pytest.approx(3.0)
    assert timing.round_seconds(2, [1] * 4, 1) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_budget": -1},
        {"rank_step": -2},
        {"min_depth": 0},
        {"reassign_every": 0},
        {"smoothing": 1.0},
        {"max_waiting_seconds": float("inf")},
        {"upload_deadline_seconds": -3.0},
        {"distribution": "flat"},
        {"weighting": "norm"},
        {"download": "some"},
    ],
)
def test_bad_options_are_refused_with_their_value(options: dict[str, object]) -> None:
    [value] = options.values()
    with pytest.raises(ValueError, match=str(value)):
        LegendConfig(**options)  # type: ignore[arg-type]  # wrong on purpose
