# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from lorikit.proto.plan import OptimizerConfig
from lorikit.sdk._optimizer import (
    clip_by_global_norm,
    first_order_effects,
    initial_slots,
    scheduled_learning_rate,
    updated,
)


def _run(config: OptimizerConfig, start: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    value, slots = start, initial_slots(config, start)
    for step, gradient in enumerate(gradients):
        value, slots = updated(
            value, gradient, slots, config, learning_rate=config.learning_rate, step=step
        )
    return value


def test_first_step_of_adamw_moves_by_the_learning_rate_against_the_sign() -> None:
    config = OptimizerConfig(learning_rate=0.1, epsilon=1e-8)
    start = np.array([1.0, 1.0, 1.0], np.float32)

    moved = _run(config, start, [np.array([5.0, -0.01, 0.0], np.float32)])

    # m / (1 - b1) = g and sqrt(v / (1 - b2)) = |g|, so the move is lr * g / |g|.
    np.testing.assert_allclose(moved, [0.9, 1.1, 1.0], rtol=1e-5)


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    for name in ("adamw", "sgd"):
        config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5)
        moved = _run(config, np.array([2.0], np.float32), [np.zeros(1, np.float32)])
        assert moved == pytest.approx([2.0 * (1 - 0.1 * 0.5)])


def test_second_step_of_momentum_adds_the_first_gradient() -> None:
    config = OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.5)
    ones = np.ones(1, np.float32)

    # Buffers 1 and 0.5 * 1 + 1 = 1.5: two moves of 1 and 1.5.
    assert _run(config, 0 * ones, [ones, ones]) == pytest.approx([-2.5])


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, beta1=0.8, beta2=0.95),
        OptimizerConfig(learning_rate=3e-3, epsilon=1e-3),
        OptimizerConfig(name="sgd", learning_rate=0.05),
        OptimizerConfig(name="sgd", learning_rate=0.05, momentum=0.9),
    ],
)
def test_hundred_steps_equal_those_of_torch(
    config: OptimizerConfig, rng: np.random.Generator
) -> None:
    torch = pytest.importorskip("torch", reason="the reference is torch.optim")
    start = rng.standard_normal((5, 4), dtype=np.float32)
    gradients = list(rng.standard_normal((100, 5, 4), dtype=np.float32))
    parameter = torch.nn.Parameter(torch.tensor(start))
    if config.name == "adamw":
        optimizer = torch.optim.AdamW(
            [parameter], lr=config.learning_rate, betas=(config.beta1, config.beta2),
            eps=config.epsilon, weight_decay=config.weight_decay,
        )  # fmt: skip
    else:
        optimizer = torch.optim.SGD([parameter], lr=config.learning_rate, momentum=config.momentum)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()

    # Both round to float32 in each step; a hundred roundings of values near 1 stay below 1e-5.
    np.testing.assert_allclose(
        _run(config, start, gradients), parameter.detach().numpy(), rtol=1e-5, atol=1e-5
    )


def test_arguments_of_a_step_stay_as_they_are(rng: np.random.Generator) -> None:
    config = OptimizerConfig(weight_decay=0.1)
    value, gradient = rng.standard_normal((2, 3), dtype=np.float32)
    slots = {"first": gradient * 2, "second": np.abs(gradient)}
    before = [value.copy(), gradient.copy(), slots["first"].copy(), slots["second"].copy()]

    updated(value, gradient, slots, config, learning_rate=0.1, step=3)

    for array, copy in zip([value, gradient, *slots.values()], before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_everything_stays_float32(rng: np.random.Generator) -> None:
    for name in ("adamw", "sgd"):
        config = OptimizerConfig(name=name, momentum=0.5, weight_decay=0.1)
        value = rng.standard_normal(3, dtype=np.float32)
        slots = initial_slots(config, value)
        value, slots = updated(value, value, slots, config, learning_rate=0.1, step=0)
        assert {array.dtype for array in (value, *slots.values())} == {np.dtype(np.float32)}


def test_linear_schedule_climbs_then_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)

    rates = [scheduled_learning_rate(config, step, 6) for step in range(6)]

    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_schedule_is_half_way_in_the_middle() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine")

    rates = [scheduled_learning_rate(config, step, 4) for step in range(4)]

    assert rates == pytest.approx(
        [2.0, 1 + math.cos(math.pi / 4), 1.0, 1 + math.cos(3 * math.pi / 4)]
    )


def test_warm_up_longer_than_the_phase_never_reaches_the_full_rate() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=10)

    assert scheduled_learning_rate(config, 3, 4) == pytest.approx(0.4)


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 50.0])
def test_joint_norm_never_exceeds_the_bound(max_norm: float) -> None:
    gradients = {"A": np.full((2, 3), 3.0, np.float32), "B": np.full(4, -1.0, np.float32)}

    clipped, norm = clip_by_global_norm(gradients, max_norm)

    assert norm == pytest.approx(math.sqrt(6 * 9 + 4))
    joint = math.sqrt(sum(float(np.vdot(a, a)) for a in clipped.values()))
    assert joint == pytest.approx(min(norm, max_norm), rel=1e-6)


def test_bound_of_zero_means_no_clipping() -> None:
    gradients = {"A": np.full(3, 1e6, np.float32)}
    assert clip_by_global_norm(gradients, 0.0)[0] is gradients


def test_first_order_effect_is_that_of_the_change_per_squared_length() -> None:
    before = {n: np.zeros(2, np.float32) for n in ("steep", "flat", "still", "sgd")}
    after = {n: np.array([3.0, -4.0], np.float32) for n in ("steep", "flat", "sgd")}
    slots = {
        "steep": {"second": np.array([4.0, 9.0], np.float32)},
        "flat": {"second": np.array([0.0, 1.0], np.float32)},
        "still": {"second": np.ones(2, np.float32)},
        "sgd": {"velocity": np.ones(2, np.float32)},
    }

    effects = first_order_effects(slots, before, {**before, **after})

    # (2 * 3 + 3 * 4) / 25, (0 + 4) / 25, and nothing moved; one without a moment has no entry.
    assert effects == pytest.approx({"steep": 18 / 25, "flat": 4 / 25, "still": 0.0})
