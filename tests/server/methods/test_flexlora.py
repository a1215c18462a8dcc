# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant, State
from lorikit.server.methods.flexlora import FlexLoRA, FlexLoRAConfig

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
BUDGETS = (6, 4, 2, 1)


def played(
    method: FlexLoRA, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> tuple[State, list[Contribution]]:
    """One round of devices with ranks 6, 4, 2, 2 and 10, 20, 30, 40 examples."""
    cohort = [device(f"d{i}", memory_limit_bytes=b) for i, b in enumerate(BUDGETS)]
    state = method.start(space, initial)
    work = method.assign(state, space, 0, cohort, np.random.default_rng(0))
    updates = [
        trainer(method, state, space, a, examples=10 * (i + 1), seed=i) for i, a in enumerate(work)
    ]
    return method.aggregate(state, space, updates), updates


def mean_product(updates: list[Contribution], a: str, b: str) -> np.ndarray:
    """The definition, with the d_out x d_in matrices formed."""
    total = sum(u.examples for u in updates)
    return sum(
        (
            u.examples / total * 2.0 * u.tensors[b].astype(np.float64) @ u.tensors[a]
            for u in updates
        ),
        np.zeros(()),
    )


@pytest.mark.parametrize("mode", ["b", "sqrt"])
def test_each_receiver_gets_the_best_approximation_of_the_mean_product(
    mode: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = FlexLoRA(FlexLoRAConfig(split=mode))  # type: ignore[arg-type]  # parametrized
    state, updates = played(method, space, initial, device, trainer)

    for update in updates:
        sent = method.broadcast(state, space, update.assignment)
        for a, b in space.pairs():
            rank = update.assignment.ranks[a.module]
            u, s, vt = np.linalg.svd(mean_product(updates, a.name, b.name), full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            np.testing.assert_allclose(2.0 * sent[b.name] @ sent[a.name], best, atol=1e-5)


def test_all_singular_values_go_to_b(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = FlexLoRA()
    state, updates = played(method, space, initial, device, trainer)

    for a, b in space.pairs():
        rows = state.tensors[a.name][:5]  # of 6; each matrix has 5 singular values
        np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-5)
        values = np.linalg.svd(mean_product(updates, a.name, b.name), compute_uv=False)
        norms = np.linalg.norm(state.tensors[b.name][:, :5], axis=0)
        np.testing.assert_allclose(norms, values / 2.0, atol=1e-5)


def test_contributors_of_another_scale_count_with_it(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    sender, receiver = (FlexLoRA(FlexLoRAConfig(scale=s)) for s in (0.5, 2.0))
    state = sender.start(space, initial)
    [work] = sender.assign(state, space, 0, [device("a")], np.random.default_rng(0))
    update = trainer(sender, state, space, work)

    adapter = receiver.global_adapter(receiver.aggregate(state, space, [update]), space)

    for a, b in space.pairs():
        wanted = 0.5 * update.tensors[b.name] @ update.tensors[a.name]
        np.testing.assert_allclose(2.0 * adapter[b.name] @ adapter[a.name], wanted, atol=1e-5)


def test_a_round_of_small_ranks_leaves_the_rest_able_to_learn(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = FlexLoRA(FlexLoRAConfig(rank_rule="fit"))
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a", max_rank=2)], np.random.default_rng(0))
    state = method.aggregate(state, space, [trainer(method, state, space, work)])

    for a, b in space.pairs():
        assert not state.tensors[b.name][:, 2:].any()
        lengths = np.linalg.norm(state.tensors[a.name], axis=1)
        width = int(a.shape[1])
        np.testing.assert_allclose(lengths[:width], 1, rtol=1e-5)


def test_the_rank_of_a_device_is_remembered(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    state, _ = played(FlexLoRA(), space, initial, device, trainer)

    assert [state.devices[f"d{i}"]["rank"] for i in range(4)] == [6, 4, 2, 2]


@pytest.mark.parametrize(
    "options", [{"split": "a"}, {"weighting": "norm"}, {"rank_rule": "x"}, {"scale": 0.0}]
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        FlexLoRAConfig(**options)  # type: ignore[arg-type]  # wrong on purpose
