# SPDX-License-Identifier: Apache-2.0
"""Splitting a matrix, given as its thin SVD, into LoRA factors of a rank and a scale."""

from __future__ import annotations

from typing import Literal

import numpy as np

from lorikit.proto.tensors import Float32
from lorikit.server.aggregate.product import Float64, Thin

Split = Literal["b", "sqrt"]

_DEAD = 1e-7
"""Singular values below this share of the largest are noise of float32 uploads."""


def split(
    thin: Thin, rank: int, *, scale: float, mode: Split = "b", spare: Float32 | None = None
) -> tuple[Float32, Float32]:
    """LoRA factors whose scaled product ``scale * B @ A`` is the best approximation of that rank.

    Ranks come out ordered by singular value, so cutting the pair gives the best approximation of
    any smaller rank. Ranks beyond the matrix's own get B = 0 and a row of A of length 1 that is
    orthogonal to the rest: they change nothing and can learn, while a zero row with a zero column
    never would.

    Args:
        thin: The matrix.
        rank: Rank of the pair; at least 1.
        scale: s of DeltaW = s B A; not 0.
        mode: ``b`` puts all singular values into B (A has orthonormal rows); ``sqrt`` puts the
            square root of S / s on both sides.
        spare: Rows to take the missing directions from, [any, d_in]; usually the previous A.

    Returns:
        A [rank, d_in] and B [d_out, rank], float32.

    Source:
        Bai et al. 2024, FlexLoRA, https://arxiv.org/abs/2402.11505: all singular values in B.
        ``sqrt`` and the live spare ranks are ours.
    """
    if rank < 1 or scale == 0 or not np.isfinite(scale):
        raise ValueError(f"rank must be at least 1 and scale not 0, got {rank} and {scale}")
    values = thin.values[:rank]
    alive = int(np.count_nonzero(values > _DEAD * max(values[0], 0.0))) if values.size else 0
    values = values[:alive] / abs(scale)
    a_part = np.sqrt(values) if mode == "sqrt" else np.ones(alive)
    a = _completed(thin.right[:rank], rank, spare)
    a[:alive] *= a_part[:, None]
    b = np.zeros((thin.left.shape[0], rank))
    b[:, :alive] = np.sign(scale) * thin.left[:, :alive] * (values / a_part)
    return a.astype(np.float32), b.astype(np.float32)


def _completed(rows: Float64, rank: int, spare: Float32 | None) -> Float64:
    """``rows`` with orthonormal rows added up to ``rank``, or zero rows beyond the width."""
    width = rows.shape[1]
    out = np.zeros((rank, width))
    out[: rows.shape[0]] = rows
    wanted = min(rank, width) - rows.shape[0]
    if wanted <= 0:
        return out
    candidates = np.eye(width) if spare is None else np.vstack([spare, np.eye(width)])
    out[rows.shape[0] : rows.shape[0] + wanted] = _orthonormal(rows, candidates, wanted)
    return out


def _orthonormal(rows: Float64, candidates: Float64, wanted: int) -> Float64:
    basis = list(rows)
    for candidate in candidates:
        if len(basis) == rows.shape[0] + wanted:
            break
        length = float(np.linalg.norm(candidate))
        rest = candidate.astype(np.float64)
        for _ in range(2):  # a second pass removes what rounding leaves of the first
            rest = rest - np.asarray(basis).T @ (np.asarray(basis) @ rest) if basis else rest
        if np.linalg.norm(rest) > 1e-3 * length:
            basis.append(rest / np.linalg.norm(rest))
    return np.asarray(basis[rows.shape[0] :])
