# SPDX-License-Identifier: Apache-2.0
"""The exact weighted mean of products s B A, as a thin singular value decomposition.

Nothing of size d_out x d_in is formed. With R the sum of the ranks, the cost is
O((d_in + d_out) R^2 + R^3) per module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Float32

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Thin:
    """A matrix as U diag(S) V^T, with singular values in falling order."""

    left: Float64
    """U, [d_out, size], orthonormal columns."""
    values: Float64
    """S, [size], at least 0."""
    right: Float64
    """V^T, [size, d_in], orthonormal rows; the largest entry of each row is positive."""

    def matrix(self) -> Float64:
        """The full matrix, [d_out, d_in]."""
        return np.asarray((self.left * self.values) @ self.right)


class ProductMean:
    """Weighted mean of s_k B_k A_k for one module, one device at a time.

    Holds the factors stacked, ``[w_1 s_1 B_1 ... ] [A_1; ...]``. Once the stack is wider than the
    matrix it stands for, it is compressed to that width, which loses nothing.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        """Args are the input and the output width of the module."""
        self._widest = min(d_in, d_out)
        self._a: list[Float32 | Float64] = []
        self._b: list[Float32 | Float64] = []
        self._factors: list[float] = []
        self._columns = 0
        self._weight = 0.0

    @property
    def weight(self) -> float:
        """Sum of the weights so far; 0 when nobody contributed."""
        return self._weight

    def add(self, a: Float32, b: Float32, *, scale: float, weight: float) -> None:
        """Add one device's pair.

        Args:
            a: A_k, [rank, d_in].
            b: B_k, [d_out, rank].
            scale: s_k; finite.
            weight: Weight of the device, for example n_k; finite, at least 0.
        """
        if not (weight >= 0 and math.isfinite(weight) and math.isfinite(scale)):
            raise ValueError(f"weight and scale must be finite, got {weight} and {scale}")
        self._append(a, b, scale * weight)
        self._weight += weight
        if self._columns > 2 * self._widest:
            self._compress()

    def finish(self) -> Thin:
        """The mean as a thin SVD.

        Raises:
            ValueError: The weights add up to 0.
        """
        if self._weight == 0:
            raise ValueError("nobody contributed to this product; keep its previous value")
        left, right = self._stacks()
        return thin_svd(left / self._weight, right)

    def _append(self, a: Float32 | Float64, b: Float32 | Float64, factor: float) -> None:
        self._a.append(a)
        self._b.append(b)
        self._factors.append(factor)
        self._columns += a.shape[0]

    def _stacks(self) -> tuple[Float64, Float64]:
        left = np.concatenate(
            [f * b.astype(np.float64) for f, b in zip(self._factors, self._b, strict=True)], axis=1
        )
        return left, np.concatenate([a.astype(np.float64) for a in self._a])

    def _compress(self) -> None:
        thin = thin_svd(*self._stacks())
        self._a, self._b, self._factors, self._columns = [], [], [], 0
        self._append(thin.right, thin.left * thin.values, 1.0)


def thin_svd(left: Float64, right: Float64) -> Thin:
    """Singular value decomposition of ``left @ right`` from two QR decompositions.

    Args:
        left: [d_out, columns], float64.
        right: [columns, d_in], float64.

    Returns:
        A decomposition of size min(columns, d_out, d_in). Signs are fixed, so that the order of
        the stacked devices does not flip a singular vector.

    Raises:
        ValueError: A value is not finite.

    Source:
        Identity ``Q_B R_B = left, Q_A R_A = right^T, U S V^T = svd(R_B R_A^T)``; float64 because
        the SVD of ill-conditioned means is reported to fail in float32.
    """
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("factors hold values that are not finite; refuse such updates before")
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, values, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rows = vt @ q_right.T
    peaks = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    signs = np.where(peaks < 0, -1.0, 1.0)
    return Thin(np.asarray(q_left @ u) * signs.T, values, rows * signs)
