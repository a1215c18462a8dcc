# SPDX-License-Identifier: Apache-2.0
"""Frobenius norms of low-rank products, without forming the product."""

from __future__ import annotations

import numpy as np

from lorikit.proto.tensors import Float32


def product_norm(a: Float32, b: Float32) -> float:
    """Frobenius norm of B A.

    Uses ``||B A||_F^2 = sum_ij (B^T B)_ij (A A^T)_ij``: r x r matrices only, in float64. The
    rounding error is about 1e-8 of the product of the factors' norms.

    Args:
        a: A, [rank, d_in].
        b: B, [d_out, rank].
    """
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((b64.T @ b64) * (a64 @ a64.T)))
    return float(np.sqrt(max(square, 0.0)))


def tail_score(a: Float32, b: Float32, first: int) -> float:
    """HETLORA's score of the ranks from ``first`` on: ||B_tail||_F ||A_tail||_F.

    An upper bound of the norm of their product; 0 for an empty tail.
    """
    tail_a, tail_b = a[first:].astype(np.float64), b[:, first:].astype(np.float64)
    return float(np.linalg.norm(tail_b) * np.linalg.norm(tail_a))
