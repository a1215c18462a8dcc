# SPDX-License-Identifier: Apache-2.0
"""Folding low-rank changes into one thin pair, which stays within a rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lorikit.proto.tensors import Float32
from lorikit.server.aggregate.product import Float64, Thin, thin_svd

_NOISE = 1e-7
"""Rounding of float32 factors, as a share of the product of their norms."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A sum of products as one pair."""

    a: Float32
    """A, [rank, d_in]."""
    b: Float32
    """B, [d_out, rank]; the sum is B A."""
    lost: float
    """Share of the sum's Frobenius norm that the limit on the rank cut off; 0 where it fits."""


def fold(
    terms: Iterable[tuple[float, Float32 | Float64, Float32 | Float64]], *, limit: int = 0
) -> Folded:
    """The best pair of at most that rank for ``sum factor * left @ right``.

    The singular values go to both sides alike. A sum of zero gives a pair of rank 1 with zeros,
    since no graph takes rank 0.

    Args:
        terms: Factor, left [d_out, any], right [any, d_in]; at least one.
        limit: Largest rank; 0 for as many as the sum has.

    Source:
        Eckart & Young 1936: the leading singular triples are the best approximation. Thin as in
        ``thin_svd``: O((d_in + d_out) R^2 + R^3) with R the sum of the ranks.
    """
    thin, noise = _summed(terms)
    alive = int(np.count_nonzero(thin.values > noise))
    kept = min(alive, limit) if limit else alive
    if kept == 0:
        shapes = (1, thin.right.shape[1]), (thin.left.shape[0], 1)
        return Folded(np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.float32), 0.0)
    roots = np.sqrt(thin.values[:kept])
    lost = float(np.linalg.norm(thin.values[kept:alive]) / np.linalg.norm(thin.values))
    a = (roots[:, None] * thin.right[:kept]).astype(np.float32)
    return Folded(a, (thin.left[:, :kept] * roots).astype(np.float32), lost)


def _summed(
    terms: Iterable[tuple[float, Float32 | Float64, Float32 | Float64]],
) -> tuple[Thin, float]:
    """The sum as a thin SVD, and the size below which a singular value is rounding."""
    lefts, rights, noise = [], [], 0.0
    for factor, left, right in terms:
        lefts.append(factor * left.astype(np.float64))
        rights.append(right.astype(np.float64))
        noise += _NOISE * float(np.linalg.norm(lefts[-1]) * np.linalg.norm(rights[-1]))
    return thin_svd(np.concatenate(lefts, axis=1), np.concatenate(rights)), noise
