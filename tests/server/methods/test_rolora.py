# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.server.federation import TinyChoice, profile, run_config

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant
from lorikit.server.methods.rolora import RoLoRA, RoLoRAConfig
from lorikit.server.plans import build_plan

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
RNG = np.random.default_rng(0)


@pytest.fixture
def name() -> str:
    return "rolora"


def test_b_moves_first_then_a_then_b(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = RoLoRA()
    state = method.start(space, initial)
    moved = []
    for number in range(3):
        [work] = method.assign(state, space, number, [device("a")], RNG)
        after = method.aggregate(state, space, [trainer(method, state, space, work, seed=number)])
        moved.append(
            {
                t.role
                for t in space.tensors
                if not np.array_equal(after.tensors[t.name], state.tensors[t.name])
            }
        )
        state = after

    assert moved == [{"lora_B", "head"}, {"lora_A", "head"}, {"lora_B", "head"}]


def test_uniform_weights_are_the_papers_plain_mean(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = RoLoRA(RoLoRAConfig(weighting="uniform"))
    state = method.start(space, initial)
    work = method.assign(state, space, 1, [device("a"), device("b")], RNG)
    one, other = (
        trainer(method, state, space, a, examples=n, seed=n)
        for a, n in zip(work, (30, 10), strict=True)
    )

    after = method.aggregate(state, space, [one, other])

    a = space.pairs()[0][0].name
    np.testing.assert_allclose(
        after.tensors[a], (one.tensors[a] + other.tensors[a]) / 2, rtol=1e-5, atol=1e-6
    )


def test_the_optimiser_of_a_round_knows_the_active_factor_alone(
    space: AdapterSpace, initial: Tensors, device: Devices, tmp_path: Path
) -> None:
    """Momentum of a factor that was frozen two rounds ago cannot be applied: it has no slot."""
    method, config = RoLoRA(), run_config(tmp_path)
    state = method.start(space, initial)
    for number, frozen in ((0, "lora_A"), (1, "lora_B"), (2, "lora_A")):
        [work] = method.assign(state, space, number, [device("a")], RNG)
        plan = build_plan(config, work, TinyChoice(), space.tensors, profile(), round_number=number)
        (phase,) = plan.phases
        assert not any(frozen in name for name in (*phase.train, *plan.send))
