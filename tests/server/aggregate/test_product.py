# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from lorikit.server.aggregate.norms import product_norm, tail_score
from lorikit.server.aggregate.product import ProductMean, thin_svd
from lorikit.server.aggregate.ranks import pad, truncate
from lorikit.server.aggregate.split import Split, split


def pair(seed: int, rank: int, d_in: int = 7, d_out: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank))
    return a.astype(np.float32), b.astype(np.float32)


def test_mean_of_products_is_exact_for_mixed_ranks_and_scales() -> None:
    mean = ProductMean(7, 11)
    expected = np.zeros((11, 7))
    for seed, (rank, scale, weight) in enumerate([(1, 2.0, 5), (3, 0.5, 2), (4, 1.0, 3)]):
        a, b = pair(seed, rank)
        mean.add(a, b, scale=scale, weight=weight)
        expected += weight / 10 * scale * b.astype(np.float64) @ a.astype(np.float64)

    np.testing.assert_allclose(mean.finish().matrix(), expected, atol=1e-12)


def test_a_stack_wider_than_the_matrix_is_compressed_without_loss() -> None:
    mean = ProductMean(7, 11)
    expected = np.zeros((11, 7))
    for seed in range(40):
        a, b = pair(seed, 3)
        mean.add(a, b, scale=2.0, weight=seed + 1)
        expected += (seed + 1) * 2.0 * b.astype(np.float64) @ a.astype(np.float64)

    np.testing.assert_allclose(mean.finish().matrix(), expected / (40 * 41 / 2), atol=1e-11)
    assert mean._columns <= 2 * 7 + 3


def test_thin_svd_agrees_with_the_svd_of_the_full_matrix() -> None:
    a, b = pair(3, 5)
    full = b.astype(np.float64) @ a.astype(np.float64)

    thin = thin_svd(b.astype(np.float64), a.astype(np.float64))

    np.testing.assert_allclose(thin.values, np.linalg.svd(full, compute_uv=False)[:5], rtol=1e-12)
    np.testing.assert_allclose(thin.left.T @ thin.left, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(thin.right @ thin.right.T, np.eye(5), atol=1e-12)


def test_order_of_the_devices_does_not_flip_singular_vectors() -> None:
    forward, backward = ProductMean(7, 11), ProductMean(7, 11)
    for seed in range(4):
        forward.add(*pair(seed, 2), scale=1.0, weight=1)
    for seed in reversed(range(4)):
        backward.add(*pair(seed, 2), scale=1.0, weight=1)

    np.testing.assert_allclose(forward.finish().right, backward.finish().right, atol=1e-10)
    np.testing.assert_allclose(forward.finish().left, backward.finish().left, atol=1e-10)


def test_nobody_and_not_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="nobody contributed"):
        ProductMean(7, 11).finish()
    with pytest.raises(ValueError, match="not finite"):
        thin_svd(np.full((3, 1), np.nan), np.ones((1, 2)))
    with pytest.raises(ValueError, match="must be finite"):
        ProductMean(7, 11).add(*pair(0, 1), scale=1.0, weight=-1)


@pytest.mark.parametrize("mode", ["b", "sqrt"])
@pytest.mark.parametrize("rank", [1, 3, 5, 7])
def test_split_is_the_best_approximation_of_its_rank(mode: Split, rank: int) -> None:
    a, b = pair(5, 5)
    full = b.astype(np.float64) @ a.astype(np.float64)
    u, s, vt = np.linalg.svd(full, full_matrices=False)

    a_out, b_out = split(
        thin_svd(b.astype(np.float64), a.astype(np.float64)), rank, scale=2.0, mode=mode
    )

    assert a_out.shape == (rank, 7)
    assert b_out.shape == (11, rank)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(2.0 * b_out @ a_out, best, atol=2e-6)  # float32 factors


def test_cutting_a_split_gives_the_split_of_the_smaller_rank() -> None:
    a, b = pair(6, 5)
    thin = thin_svd(b.astype(np.float64), a.astype(np.float64))

    cut = truncate(*split(thin, 5, scale=2.0), 2)

    for one, other in zip(cut, split(thin, 2, scale=2.0), strict=True):
        assert np.array_equal(one, other)


def test_modes_put_the_singular_values_where_they_say() -> None:
    a, b = pair(7, 4)
    thin = thin_svd(b.astype(np.float64), a.astype(np.float64))

    a_b, _ = split(thin, 4, scale=2.0, mode="b")
    a_sqrt, b_sqrt = split(thin, 4, scale=2.0, mode="sqrt")

    np.testing.assert_allclose(a_b @ a_b.T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(a_sqrt, axis=1), np.linalg.norm(b_sqrt, axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("mode", ["b", "sqrt"])
def test_spare_ranks_can_learn_and_change_nothing(mode: Split) -> None:
    a, b = pair(8, 2)
    previous = pair(9, 6)[0]
    thin = thin_svd(b.astype(np.float64), a.astype(np.float64))

    a_out, b_out = split(thin, 6, scale=2.0, mode=mode, spare=previous)

    np.testing.assert_allclose(2.0 * b_out @ a_out, b @ a, atol=2e-6)
    assert not b_out[:, 2:].any()
    np.testing.assert_allclose(a_out[2:] @ a_out[2:].T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(a_out[2:] @ a_out[:2].T, 0, atol=1e-6)


@pytest.mark.parametrize("mode", ["b", "sqrt"])
def test_a_product_of_zero_leaves_live_rows(mode: Split) -> None:
    a, _ = pair(1, 3)
    thin = thin_svd(np.zeros((11, 3)), a.astype(np.float64))

    a_out, b_out = split(thin, 4, scale=2.0, mode=mode)

    assert not b_out.any()
    np.testing.assert_allclose(np.linalg.norm(a_out, axis=1), 1, rtol=1e-6)


def test_a_rank_above_the_width_gets_zero_rows() -> None:
    a, b = pair(2, 3)
    thin = thin_svd(b.astype(np.float64), a.astype(np.float64))

    a_out, b_out = split(thin, 9, scale=1.0)

    assert a_out.shape == (9, 7)
    assert not a_out[7:].any()
    np.testing.assert_allclose(b_out @ a_out, b @ a, atol=2e-6)


def test_a_negative_scale_still_gives_the_product() -> None:
    a, b = pair(2, 3)
    thin = thin_svd(b.astype(np.float64), a.astype(np.float64))

    a_out, b_out = split(thin, 3, scale=-2.0, mode="sqrt")

    np.testing.assert_allclose(-2.0 * b_out @ a_out, b @ a, atol=2e-6)


def test_product_norm_is_the_norm_of_the_product() -> None:
    a, b = pair(4, 3)

    assert product_norm(a, b) == pytest.approx(np.linalg.norm(b.astype(float) @ a), rel=1e-7)
    assert product_norm(a, np.zeros_like(b)) == 0


def test_tail_score_by_hand() -> None:
    a = np.array([[1, 0], [3, 4]], np.float32)
    b = np.array([[9, 0], [9, 2], [9, 0]], np.float32)

    assert tail_score(a, b, 1) == 5 * 2
    assert tail_score(a, b, 2) == 0


def test_padding_keeps_the_product_and_truncation_undoes_it() -> None:
    a, b = pair(4, 3)

    padded = pad(a, b, 5)

    assert padded[0].shape == (5, 7)
    assert padded[1].shape == (11, 5)
    np.testing.assert_array_equal(padded[1] @ padded[0], b @ a)
    for one, other in zip(truncate(*padded, 3), (a, b), strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(ValueError, match="cannot pad rank 3 to 2"):
        pad(a, b, 2)
