# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant
from lorikit.server.methods.ffa_lora import FFALoRA, FFALoRAConfig, orthogonal_rows

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
RNG = np.random.default_rng(0)


@pytest.fixture
def name() -> str:
    return "ffa-lora"


def test_the_mean_by_hand_keeps_a_and_averages_b(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = FFALoRA()
    state = method.start(space, initial)
    work = method.assign(state, space, 0, [device("a"), device("b")], RNG)
    one, other = (
        trainer(method, state, space, a, examples=n, seed=n)
        for a, n in zip(work, (30, 10), strict=True)
    )

    after = method.aggregate(state, space, [one, other])

    for a, b in space.pairs():
        assert np.array_equal(after.tensors[a.name], initial[a.name])
        wanted = 0.75 * one.tensors[b.name] + 0.25 * other.tensors[b.name]
        np.testing.assert_allclose(after.tensors[b.name], wanted, rtol=1e-5, atol=1e-6)


def test_all_devices_get_the_one_a_of_the_server_in_every_round(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """With an A of its own on each device the mean of B would mix unrelated subspaces."""
    method = FFALoRA()
    state = method.start(space, initial)
    a = space.pairs()[0][0].name
    for number in range(3):
        work = method.assign(state, space, number, [device("a"), device("b")], RNG)
        assert all(
            np.array_equal(method.broadcast(state, space, one)[a], initial[a]) for one in work
        )
        state = method.aggregate(state, space, [trainer(method, state, space, w) for w in work])


def test_an_update_that_brings_an_a_along_does_not_move_it(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = FFALoRA()
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], RNG)
    update = trainer(method, state, space, work)
    a = space.pairs()[0][0].name
    forged = {**update.tensors, a: initial[a] + 1}

    after = method.aggregate(state, space, [replace(update, tensors=forged)])

    assert np.array_equal(after.tensors[a], initial[a])


def test_orthogonal_rows_span_the_same_space_at_the_same_mean_length() -> None:
    a = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)

    rows = orthogonal_rows(a)

    gram = rows @ rows.T
    np.testing.assert_allclose(gram, np.eye(3) * np.sum(a**2) / 3, atol=1e-4)
    coefficients = np.linalg.lstsq(rows.T, a.T, rcond=None)[0]
    np.testing.assert_allclose(rows.T @ coefficients, a.T, atol=1e-5)


def test_more_rows_than_columns_stay_as_they_are(space: AdapterSpace, initial: Tensors) -> None:
    state = FFALoRA(FFALoRAConfig(rows="orthogonal")).start(space, initial)

    for a, _ in space.pairs():
        rows = state.tensors[a.name]
        if a.shape[1] == 5:  # rank 6
            assert np.array_equal(rows, initial[a.name])
        else:
            np.testing.assert_allclose(rows @ rows.T, np.diag(np.diag(rows @ rows.T)), atol=1e-4)


def test_the_head_stays_where_it_is_told_to(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = FFALoRA(FFALoRAConfig(train_head=False))
    [work] = method.assign(method.start(space, initial), space, 0, [device("a")], RNG)

    assert work.train_roles == ("lora_B",)


def test_rows_of_another_name_are_refused() -> None:
    with pytest.raises(ValueError, match="rows must be 'drawn' or 'orthogonal', got 'unit'"):
        FFALoRAConfig(rows="unit")  # type: ignore[arg-type]  # wrong on purpose
