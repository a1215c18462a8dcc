# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from lorikit.proto.tensors import Float32
from lorikit.server.aggregate.correction import cosine_correction, ridge_correction
from lorikit.server.aggregate.product import Thin, thin_svd

Case = tuple[Thin, Float32, Float32]


@pytest.fixture
def case() -> Case:
    """A wanted 11 x 7 matrix, and factors of rank 3."""
    rng = np.random.default_rng(2)
    wanted = thin_svd(rng.normal(size=(11, 5)), rng.normal(size=(5, 7)))
    a, b = rng.normal(size=(3, 7)), rng.normal(size=(11, 3))
    return wanted, a.astype(np.float32), b.astype(np.float32)


def ridge_loss(case: Case, b: Float32, penalty: float) -> float:
    """The definition, with the matrices formed."""
    wanted, a, start = case
    error = np.linalg.norm(wanted.matrix() - b.astype("f8") @ a) ** 2
    return float(error + penalty * np.linalg.norm(b.astype("f8") - start) ** 2)


def cosine_loss(case: Case, b: Float32, penalty: float) -> float:
    wanted, a, start = case
    own, target = b.astype("f8") @ a, wanted.matrix()
    cosine = np.sum(own * target) / np.linalg.norm(own) / np.linalg.norm(target)
    return float(1 - cosine + penalty * np.linalg.norm(b.astype("f8") - start))


def test_the_closed_form_by_hand() -> None:
    """One row A = (2, 0), B = (1): D = 6 gives dB = (6 - 2) 2 / (4 + 4) = 1."""
    wanted = thin_svd(np.array([[6.0]]), np.array([[1.0, 0.0]]))
    a, b = np.array([[2.0, 0.0]], np.float32), np.array([[1.0]], np.float32)

    assert ridge_correction(wanted, a, b, penalty=4.0) == pytest.approx(2.0)
    assert ridge_correction(wanted, a, b, penalty=0.0) == pytest.approx(3.0)


@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0])
def test_the_closed_form_is_a_minimum(case: Case, penalty: float) -> None:
    best = ridge_correction(*case, penalty=penalty)

    rng = np.random.default_rng(0)
    for _ in range(20):
        near = best + 0.01 * rng.normal(size=best.shape).astype(np.float32)
        assert ridge_loss(case, near, penalty) > ridge_loss(case, best, penalty)


def test_a_large_penalty_leaves_the_mean(case: Case) -> None:
    np.testing.assert_allclose(ridge_correction(*case, penalty=1e9), case[2], atol=1e-6)


def test_rows_of_a_that_depend_on_each_other_take_the_smallest_step() -> None:
    wanted = thin_svd(np.array([[4.0]]), np.array([[1.0]]))
    a, b = np.ones((2, 1), np.float32), np.zeros((1, 2), np.float32)

    np.testing.assert_allclose(ridge_correction(wanted, a, b, penalty=0.0), [[2.0, 2.0]], rtol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_descent_on_the_cosine_improves_it(case: Case, penalty: float) -> None:
    moved = cosine_correction(*case, penalty=penalty, steps=100, learning_rate=0.01)

    assert cosine_loss(case, moved, penalty) < cosine_loss(case, case[2], penalty)


def test_the_slope_of_the_cosine_is_that_of_finite_differences(case: Case) -> None:
    rate, wide = 1e-3, case[2].astype("f8")
    step = cosine_correction(*case, penalty=0.0, steps=1, learning_rate=rate) - case[2]
    slope = np.zeros_like(wide)
    for index in np.ndindex(*wide.shape):
        up, down = wide.copy(), wide.copy()
        up[index] += 1e-4
        down[index] -= 1e-4
        slope[index] = (cosine_loss(case, up, 0.0) - cosine_loss(case, down, 0.0)) / 2e-4

    np.testing.assert_allclose(step, -rate * slope, atol=5e-7)  # float32 of values near 1


@pytest.mark.parametrize("which", ["wanted", "own"])
def test_what_has_no_direction_is_left_alone(case: Case, which: str) -> None:
    wanted, a, b = case
    if which == "wanted":
        wanted = Thin(wanted.left, 0 * wanted.values, wanted.right)
    else:
        b = 0 * b
    moved = cosine_correction(wanted, a, b, penalty=0.01, steps=3, learning_rate=0.1)

    assert np.array_equal(moved, b)


def test_nothing_moves_where_the_product_is_already_right(case: Case) -> None:
    _, a, b = case
    wanted = thin_svd(b.astype("f8"), a.astype("f8"))

    np.testing.assert_allclose(ridge_correction(wanted, a, b, penalty=0.01), b, atol=1e-6)
    moved = cosine_correction(wanted, a, b, penalty=0.01, steps=10, learning_rate=0.01)
    np.testing.assert_allclose(moved, b, atol=1e-3)
