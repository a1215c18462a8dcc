# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from lorikit.server.aggregate.fold import fold


def pair(seed: int, rank: int, d_in: int = 7, d_out: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank))
    return a.astype(np.float32), b.astype(np.float32)


def test_a_sum_of_products_is_kept_whole_where_it_fits() -> None:
    (a, b), (c, d) = pair(0, 2), pair(1, 3)

    folded = fold([(1.0, b, a), (-0.5, d, c)], limit=5)

    np.testing.assert_allclose(folded.b @ folded.a, b @ a - 0.5 * d @ c, atol=1e-5)
    assert folded.a.shape == (5, 7)
    assert folded.lost == 0.0


def test_the_rank_of_the_sum_counts_not_that_of_the_stack() -> None:
    a, b = pair(0, 2)

    folded = fold([(1.0, b, a), (3.0, b, a)])

    assert folded.a.shape == (2, 7)
    np.testing.assert_allclose(folded.b @ folded.a, 4 * b @ a, atol=1e-4)


def test_a_limit_keeps_the_best_and_says_what_is_lost() -> None:
    b, a = np.diag([3.0, 4.0, 12.0]).astype(np.float32), np.eye(3, dtype=np.float32)

    folded = fold([(1.0, b, a)], limit=1)

    np.testing.assert_allclose(folded.b @ folded.a, np.diag([0, 0, 12]), atol=1e-5)
    assert folded.lost == pytest.approx(5 / 13)


def test_changes_that_cancel_leave_a_pair_of_zeros() -> None:
    a, b = pair(0, 2)

    folded = fold([(1.0, b, a), (-1.0, b, a)])

    assert folded.a.shape == (1, 7)
    assert not folded.a.any()
    assert not folded.b.any()


def test_nothing_but_zeros_is_a_pair_of_rank_one() -> None:
    a, b = np.zeros((2, 7), np.float32), np.zeros((11, 2), np.float32)

    folded = fold([(1.0, b, a)])

    assert (folded.a.shape, folded.b.shape, folded.lost) == ((1, 7), (11, 1), 0.0)
