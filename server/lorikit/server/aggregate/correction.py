# SPDX-License-Identifier: Apache-2.0
"""Moving B so that B A comes near a wanted matrix: LoRA-FAIR's refinement."""

from __future__ import annotations

import numpy as np

from lorikit.proto.tensors import Float32
from lorikit.server.aggregate.product import Float64, Thin


def ridge_correction(wanted: Thin, a: Float32, b: Float32, *, penalty: float) -> Float32:
    """The B that minimises ``||D - B' A||_F^2 + penalty ||B' - B||_F^2``.

    With a penalty of 0 and linearly dependent rows of A the smallest such step is taken.

    Args:
        wanted: D, [d_out, d_in].
        a: A, [rank, d_in].
        b: B, [d_out, rank].
        penalty: lambda; at least 0.

    Source:
        The normal equations ``dB (A A^T + lambda I) = (D - B A) A^T``.
    """
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    gram = a64 @ a64.T
    missing = _times(wanted, a64) - b64 @ gram
    system = gram + penalty * np.eye(len(gram))
    step = np.linalg.lstsq(system, missing.T, rcond=None)[0].T
    return np.asarray(b64 + step, np.float32)


def cosine_correction(
    wanted: Thin,
    a: Float32,
    b: Float32,
    *,
    penalty: float,
    steps: int,
    learning_rate: float,
) -> Float32:
    """B after gradient descent on ``1 - cos(D, B' A) + penalty ||B' - B||_F``.

    Args:
        wanted: D, [d_out, d_in].
        a: A, [rank, d_in].
        b: B, [d_out, rank]; comes back unchanged where D or B A is 0, which have no direction.
        penalty: lambda; at least 0.
        steps: Descent steps.
        learning_rate: Step size.
    """
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    gram = a64 @ a64.T
    target, length = _times(wanted, a64), float(np.linalg.norm(wanted.values))
    now = b64.copy()
    for _ in range(steps):
        own = float(np.sqrt(np.sum((now.T @ now) * gram)))
        if length == 0 or own == 0:
            return b.copy()
        cosine = float(np.sum(target * now)) / (length * own)
        slope = cosine / own**2 * (now @ gram) - target / (length * own)
        moved = now - b64
        distance = float(np.linalg.norm(moved))
        if distance > 0:
            slope += penalty / distance * moved
        now = now - learning_rate * slope
    return np.asarray(now, np.float32)


def _times(wanted: Thin, a: Float64) -> Float64:
    """``D A^T`` [d_out, rank], without D."""
    return np.asarray((wanted.left * wanted.values) @ (wanted.right @ a.T))
