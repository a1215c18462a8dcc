# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant, State
from lorikit.server.methods.lora_a2 import LoRAA2, LoRAA2Config, chosen_counts, chosen_ranks
from lorikit.server.methods.state import pack_state, unpack_state

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
MODULES = 8
SMALL = LoRAA2Config(rank_rule="fit", probe_every=3)


@pytest.fixture
def name() -> str:
    return "lora-a2"


def played(
    method: LoRAA2,
    state: State,
    space: AdapterSpace,
    cohort: list[Participant],
    trainer: Trainer,
    number: int,
) -> tuple[State, list[Contribution]]:
    work = method.assign(state, space, number, cohort, np.random.default_rng(number))
    updates = [
        trainer(method, state, space, w, examples=10 * (i + 1), seed=10 * number + i)
        for i, w in enumerate(work)
    ]
    return method.aggregate(state, space, updates), updates


def test_the_highest_scores_of_the_whole_model_win_one_a_module_at_least() -> None:
    scores = np.array([[1, 9, 8, 7], [2, 1, 0, 0], [6, 0, 0, 5]], np.float32)

    assert chosen_counts(scores, 2) == [3, 1, 2]  # 6 of 12: one each, then 8, 7 and 5
    assert chosen_counts(scores, 1) == [1, 1, 1]
    assert chosen_counts(scores, 9) == [4, 4, 4]
    assert chosen_ranks(scores[0], 3).tolist() == [1, 2, 3]
    assert chosen_ranks(scores[2], 2).tolist() == [0, 3]
    assert chosen_ranks(np.zeros(4, np.float32), 2).tolist() == [0, 1]  # the first of equals


def test_scores_are_the_norms_of_each_ranks_change_of_the_product(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """``||dB[:, i] A[i, :]||_F`` in a B round, ``||B[:, i] dA[i, :]||_F`` in an A round."""
    method = LoRAA2(SMALL)
    state = method.start(space, initial)
    for number, factor in enumerate(("lora_B", "lora_A")):
        before = state.tensors
        state, [update] = played(method, state, space, [device("d", max_rank=2)], trainer, number)
        scores = state.tensors[f"lora_a2.scores.d.{factor}"]
        for row, (a, b) in zip(scores, space.pairs(), strict=True):
            for i, score in enumerate(row):
                left, right = before[b.name][:, i], before[a.name][i]
                if factor == "lora_B":
                    left = update.tensors[b.name][:, i] - left
                else:
                    right = update.tensors[a.name][i] - right
                assert score == pytest.approx(np.linalg.norm(np.outer(left, right)), rel=1e-5)


def test_after_the_probe_a_device_sends_its_budget_and_no_more(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = LoRAA2(SMALL)
    state = method.start(space, initial)
    sent = []
    for number in range(8):
        state, [update] = played(method, state, space, [device("d", max_rank=2)], trainer, number)
        sent.append(sum(update.assignment.ranks.values()))

    full, budget = 6 * MODULES, 2 * MODULES
    assert sent == [full, full, budget, budget, budget, budget, full, full]  # every third turn


def test_only_chosen_columns_move_and_by_the_share_of_all_devices(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = LoRAA2(SMALL)
    cohort = [device("d0", max_rank=2), device("d1", max_rank=3)]
    state = method.start(space, initial)
    for number in range(2):
        state, _ = played(method, state, space, cohort, trainer, number)
    after, updates = played(method, state, space, cohort, trainer, 2)

    for index, (a, b) in enumerate(space.pairs()):
        wanted = state.tensors[b.name].astype("f8")
        for share, update in zip((1 / 3, 2 / 3), updates, strict=True):
            count = update.assignment.ranks[a.module]
            row = state.tensors[f"lora_a2.scores.{update.device_id}.lora_B"][index]
            chosen = np.sort(np.argsort(-row)[:count])
            change = update.tensors[b.name] - state.tensors[b.name][:, chosen]
            wanted[:, chosen] += share * change
        np.testing.assert_allclose(after.tensors[b.name], wanted, atol=1e-5)
        assert np.array_equal(after.tensors[a.name], state.tensors[a.name])


def test_a_device_computes_with_all_ranks_whatever_it_trains(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = LoRAA2(SMALL)
    state = method.start(space, initial)
    for number in range(2):
        state, _ = played(method, state, space, [device("d", max_rank=2)], trainer, number)
    [work] = method.assign(state, space, 2, [device("d", max_rank=2)], np.random.default_rng(0))

    received = method.broadcast(state, space, work)

    for a, b in space.pairs():
        whole = 2.0 * state.tensors[b.name].astype("f8") @ state.tensors[a.name]
        chosen = 2.0 * received[b.name].astype("f8") @ received[a.name]
        frozen = (
            received[f"{a.module}.base_delta_B"].astype("f8") @ received[f"{a.module}.base_delta_A"]
        )
        np.testing.assert_allclose(chosen + frozen, whole, atol=1e-5)
        assert received[a.name].shape[0] == work.ranks[a.module] < 6


def test_frozen_ranks_are_no_part_of_what_the_optimiser_sees(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """A masked gradient alone would let AdamW's decay move masked entries; these are elsewhere."""
    method = LoRAA2(SMALL)
    state = method.start(space, initial)
    for number in range(2):
        state, _ = played(method, state, space, [device("d", max_rank=2)], trainer, number)
    after, [update] = played(method, state, space, [device("d", max_rank=2)], trainer, 2)
    decayed = replace(update, tensors={n: np.float32(0.9) * v for n, v in update.tensors.items()})

    moved = method.aggregate(state, space, [decayed])

    for index, (a, b) in enumerate(space.pairs()):
        row = state.tensors["lora_a2.scores.d.lora_B"][index]
        rest = np.setdiff1d(np.arange(6), np.argsort(-row)[: update.assignment.ranks[a.module]])
        for result in (after, moved):
            assert np.array_equal(result.tensors[b.name][:, rest], state.tensors[b.name][:, rest])


def test_a_device_that_joins_late_probes_first_and_alone(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = LoRAA2(SMALL)
    early, late = device("early", max_rank=2), device("late", max_rank=2)
    state = method.start(space, initial)
    for number in range(2):
        state, _ = played(method, state, space, [early], trainer, number)
    state = unpack_state(pack_state(state))

    work = method.assign(state, space, 2, [early, late], np.random.default_rng(0))

    assert [sum(w.ranks.values()) for w in work] == [2 * MODULES, 6 * MODULES]


def test_an_update_with_fewer_ranks_than_chosen_is_refused(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """One column would stand for all chosen ones if numpy were left to broadcast it."""
    method = LoRAA2(SMALL)
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("d")], np.random.default_rng(0))
    update = trainer(method, state, space, work)
    b = space.pairs()[0][1].name
    short = replace(update, tensors={**update.tensors, b: update.tensors[b][:, :1]})

    with pytest.raises(ValueError, match=r"device d sent .* \(9, 1\), it was given \(9, 6\)"):
        method.aggregate(state, space, [short])


@pytest.mark.parametrize("options", [{"probe_every": 0}, {"weighting": "norm"}, {"min_rank": 0}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        LoRAA2Config(**options)  # type: ignore[arg-type]  # wrong on purpose
