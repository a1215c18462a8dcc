# SPDX-License-Identifier: Apache-2.0
"""The identities of a quantised base and its repair, on matrices small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lorikit.quantization import codec
from lorikit.server.aggregate.base_error import (
    affine_match,
    best_factors,
    compensator,
    effective_mean,
    for_base,
    loftq,
    matched_change,
    matched_left,
    output_error,
    precision_weight,
    repaired_share,
    seen_by,
    whitening,
)

SCHEMES = ("int8", "int4-row32", "nf4")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def quantised(name: str, values: np.ndarray) -> np.ndarray:
    chosen = codec(name)
    return chosen.decode(chosen.encode(values.astype(np.float32))).astype(np.float64)


def errors_of(weights: np.ndarray) -> dict[str, np.ndarray]:
    return {name: quantised(name, weights) - weights for name in SCHEMES}


def inputs(seed: int, width: int) -> np.ndarray:
    """Inputs with a few strong directions, [width, samples]."""
    strength = np.logspace(0, -2, width)
    return (strength[:, None] * normal(seed, width, 200))[
        np.random.default_rng(seed).permutation(width)
    ]


def test_a_compensator_of_full_rank_undoes_the_error() -> None:
    error = normal(0, 5, 7)

    a, b = compensator(error, 5)

    np.testing.assert_allclose(b @ a, -error, atol=1e-5)


def test_a_plain_compensator_leaves_the_smaller_singular_values() -> None:
    error = np.diag([3.0, 2.0, 1.0])

    a, b = compensator(error, 1)

    np.testing.assert_allclose(error + b @ a, np.diag([0.0, 2.0, 1.0]), atol=1e-6)


def test_inputs_decide_what_a_compensator_repairs() -> None:
    # The larger error meets an input that is a hundred times smaller, so the other one counts.
    error, moments = np.diag([3.0, 2.0]), np.diag([1e-4, 1.0])

    a, b = compensator(error, 1, whitening(moments))

    np.testing.assert_allclose(error + b @ a, np.diag([3.0, 0.0]), atol=1e-5)


def test_no_pair_of_the_rank_leaves_less_at_the_output_than_an_aware_compensator() -> None:
    error, moments = normal(0, 12, 12), inputs(1, 12) @ inputs(1, 12).T
    root = whitening(moments)
    a, b = compensator(error, 3, root)
    least = output_error(error + b @ a, root)

    # What is left is the tail of the singular values of E S.
    tail = np.linalg.svd(error @ root, compute_uv=False)[3:]
    assert least == pytest.approx(np.linalg.norm(tail), rel=1e-4)
    for seed in range(20):
        nearby = error + (b + 0.01 * normal(seed, *b.shape)) @ (
            a + 0.01 * normal(-seed % 97, *a.shape)
        )
        assert output_error(nearby, root) >= least


def test_awareness_of_inputs_leaves_less_error_than_a_plain_compensator() -> None:
    weights = normal(3, 12, 12)
    error = errors_of(weights)["int4-row32"]
    moments = inputs(4, 12) @ inputs(4, 12).T

    left = {}
    for known in (None, whitening(moments)):
        a, b = compensator(error, 3, known)
        left[known is None] = output_error(error + b @ a, whitening(moments))

    assert left[False] < 0.9 * left[True]


def test_effective_weights_of_full_rank_are_the_same_on_every_base() -> None:
    # a.5, C2: devices that repaired their own base completely; kappa = 1 restores W + D.
    weights, change = normal(0, 12, 12), 0.1 * normal(1, 12, 12)
    errors = errors_of(weights)
    updates = [change - error for error in errors.values()]

    mean = effective_mean(updates, list(errors.values()), [1.0, 2.0, 1.0])

    np.testing.assert_allclose(mean, change, atol=1e-12)
    for error in errors.values():
        a, b = for_base(mean, error, 12, scale=2.0)
        np.testing.assert_allclose(weights + error + 2.0 * b @ a, weights + change, atol=1e-12)


def test_plain_averaging_leaves_an_error_of_the_size_of_the_coarsest_base() -> None:
    weights, change = normal(0, 12, 12), 0.1 * normal(1, 12, 12)
    errors = errors_of(weights)
    updates = [change - error for error in errors.values()]

    plain = effective_mean(updates, list(errors.values()), [1.0] * 3, share=0.0)

    coarsest = max(np.linalg.norm(error) for error in errors.values())
    off = max(np.linalg.norm(error + plain - change) for error in errors.values())
    assert 0.3 * coarsest < off < 1.5 * coarsest


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_one_common_base_makes_the_share_irrelevant(share: float) -> None:
    error = errors_of(normal(0, 12, 12))["nf4"]
    updates = [normal(seed, 12, 12) for seed in (1, 2)]

    mean = effective_mean(updates, [error, error], [1.0, 3.0], share=share)
    a, b = for_base(mean, error, 12, scale=1.0, share=share)

    np.testing.assert_allclose(b @ a, 0.25 * updates[0] + 0.75 * updates[1], atol=1e-10)


def test_errors_of_independent_stochastic_rounding_average_out() -> None:
    # E[sum_k p_k E_k] = 0, so the mean square of K independent errors shrinks like 1/K.
    weights = normal(0, 32, 64).astype(np.float32)
    chosen = codec("int4-row32")

    def mean_square(count: int) -> float:
        total = np.zeros(weights.shape)
        for seed in range(count):
            rng = np.random.default_rng([count, seed])
            total += chosen.decode(chosen.encode(weights, rng=rng)) - weights
        return float(np.square(total / count).mean())

    ratio = mean_square(1) / mean_square(16)
    # Each is a mean over 2048 values, whose relative deviation is about sqrt(2 / 2048) = 3 %.
    assert ratio == pytest.approx(16, rel=0.2)


def test_a_pair_sees_the_part_of_an_error_within_its_span() -> None:
    error = np.array([[1.0, 2.0], [3.0, 4.0]])
    a, b = np.array([[2.0, 0.0]]), np.array([[0.0], [5.0]])

    # P_B keeps the second row, P_A the first column.
    np.testing.assert_allclose(seen_by(error, a, b) @ a, [[0.0, 0.0], [3.0, 0.0]], atol=1e-12)


def test_the_repaired_share_is_read_off_the_pair() -> None:
    error = np.array([[1.0, 2.0], [3.0, 4.0]])
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0], [1.0]])

    # s B A is -0.9 where the error that the pair sees is 3.
    assert repaired_share(error, a, -0.45 * b, scale=2.0) == (
        pytest.approx(0.3),
        pytest.approx(0.81),
    )
    assert repaired_share(error, a, 0.45 * b, scale=2.0) == (0.0, 0.0)
    assert repaired_share(error, a, 0.0 * b, scale=2.0) == (0.0, 0.0)


def test_matching_outputs_without_a_bound_is_the_change_less_the_error() -> None:
    change, error = normal(0, 6, 8), normal(1, 6, 8)
    moments = inputs(2, 8) @ inputs(2, 8).T

    a, b = matched_change(change, error, moments, 6)

    np.testing.assert_allclose(b @ a, change - error, atol=1e-4)


def test_a_large_penalty_keeps_the_change_itself() -> None:
    change, error = normal(0, 6, 8), normal(1, 6, 8)

    a, b = matched_change(change, error, np.eye(8), 6, penalty=1e6)

    np.testing.assert_allclose(b @ a, change, atol=1e-4)


def test_a_penalty_weighs_outputs_against_the_change() -> None:
    # With M = I the minimum is (D - E + mu D) / (1 + mu): with mu = 1, D - E / 2.
    change, error = normal(0, 6, 8), normal(1, 6, 8)

    a, b = matched_change(change, error, np.eye(8), 6, penalty=1.0)

    np.testing.assert_allclose(b @ a, change - error / 2, atol=1e-6)


def test_matching_within_the_rows_of_a_solves_the_normal_equations() -> None:
    error, a = normal(0, 6, 8), normal(1, 3, 8)
    moments = inputs(2, 8) @ inputs(2, 8).T

    k = matched_left(error, a, whitening(moments, damping=1e-9))

    np.testing.assert_allclose(
        (error - k @ a) @ moments @ a.T, 0, atol=1e-5 * np.abs(moments).sum()
    )


def test_an_affine_map_restores_mean_and_variance() -> None:
    exact = normal(0, 100, 4)
    coarse = 0.5 * exact + np.array([1.0, 2.0, 3.0, 4.0])
    coarse[:, 3] = 7.0

    gamma, beta = affine_match(exact, coarse)

    np.testing.assert_allclose(gamma, [2.0, 2.0, 2.0, 1.0], atol=1e-9)
    moved = gamma * coarse + beta
    np.testing.assert_allclose(moved[:, :3], exact[:, :3], atol=1e-9)
    np.testing.assert_allclose(moved.mean(axis=0), exact.mean(axis=0), atol=1e-9)


def test_weights_fall_with_the_square_of_the_error() -> None:
    # At sigma = tau a device counts half as much as one with an exact base.
    exact = precision_weight(100, 0.0, floor=0.05)

    assert precision_weight(100, 0.05, floor=0.05) == pytest.approx(exact / 2)


def test_loftq_with_one_iteration_is_the_best_pair_for_the_error() -> None:
    weights = normal(0, 24, 32).astype(np.float32)

    base, a, b = loftq(weights, lambda w: quantised("nf4", w).astype(np.float32), 4)

    np.testing.assert_array_equal(base, quantised("nf4", weights).astype(np.float32))
    tail = np.linalg.svd(weights - base.astype(np.float64), compute_uv=False)[4:]
    assert np.linalg.norm(weights - base - b @ a) == pytest.approx(np.linalg.norm(tail), rel=1e-5)


def test_more_iterations_of_loftq_come_nearer() -> None:
    weights = normal(0, 64, 64).astype(np.float32)

    def distance(iterations: int) -> float:
        base, a, b = loftq(
            weights,
            lambda w: quantised("nf4", w).astype(np.float32),
            16,
            iterations=iterations,
        )
        return float(np.linalg.norm(weights - base - b @ a))

    assert distance(5) < distance(1) < np.linalg.norm(weights - quantised("nf4", weights))


@pytest.mark.parametrize("moments", [np.ones((2, 3)), np.full((2, 2), np.nan), -np.eye(2)])
def test_what_are_no_moments_is_refused(moments: np.ndarray) -> None:
    with pytest.raises(ValueError, match="moments"):
        whitening(moments)


def test_factors_need_a_rank_and_finite_numbers() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        best_factors(np.eye(2), 0)
    with pytest.raises(ValueError, match="not finite"):
        best_factors(np.full((2, 2), np.inf), 1)
