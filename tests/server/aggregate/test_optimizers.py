# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from lorikit.server.aggregate.optimizers import adam_step, momentum_step

CHANGE = np.array([[1.0, -2.0]], np.float32)
ZERO = np.zeros_like(CHANGE)


def test_no_momentum_and_rate_one_is_plain_averaging() -> None:
    step, momentum = momentum_step(CHANGE, ZERO, learning_rate=1.0, beta=0.0)

    assert np.array_equal(step, CHANGE)
    assert np.array_equal(momentum, CHANGE)


def test_momentum_adds_up_by_hand() -> None:
    _, momentum = momentum_step(CHANGE, ZERO, learning_rate=0.5, beta=0.5)
    step, momentum = momentum_step(CHANGE, momentum, learning_rate=0.5, beta=0.5)

    assert momentum.tolist() == [[1.5, -3.0]]
    assert step.tolist() == [[0.75, -1.5]]


def test_adam_by_hand() -> None:
    v0 = np.full_like(CHANGE, 0.25)

    step, m, v = adam_step(CHANGE, ZERO, v0, learning_rate=0.1, beta1=0.5, beta2=0.75, tau=0.5)

    assert m.tolist() == [[0.5, -1.0]]
    assert v.tolist() == [[0.75 * 0.25 + 0.25 * 1, 0.75 * 0.25 + 0.25 * 4]]
    expected = [0.1 * 0.5 / (0.4375**0.5 + 0.5), -0.1 * 1.0 / (1.1875**0.5 + 0.5)]
    assert step[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_large_tau_is_averaging_with_a_small_rate() -> None:
    step, _, _ = adam_step(CHANGE, ZERO, ZERO, learning_rate=1e6, beta1=0.0, beta2=0.99, tau=1e6)

    np.testing.assert_allclose(step, CHANGE, rtol=1e-5)
