# SPDX-License-Identifier: Apache-2.0
"""Server optimisers: steps along the aggregated change instead of taking it as it is."""

from __future__ import annotations

import numpy as np

from lorikit.proto.tensors import Float32


def momentum_step(
    change: Float32, momentum: Float32, *, learning_rate: float, beta: float
) -> tuple[Float32, Float32]:
    """One FedAvgM step.

    ``m <- beta m + change``, step ``learning_rate * m``. ``beta`` 0 and rate 1 give plain
    averaging.

    Args:
        change: Aggregate minus previous value, any shape.
        momentum: m before the step, same shape; zeros at first.
        learning_rate: Server learning rate; above 0.
        beta: Momentum in [0, 1).

    Returns:
        What to add to the previous value, and m after the step; float32.

    Source:
        Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
        Visual Classification", https://arxiv.org/abs/1909.06335.
    """
    moved = beta * momentum.astype(np.float64) + change
    return (learning_rate * moved).astype(np.float32), moved.astype(np.float32)


def adam_step(
    change: Float32,
    first: Float32,
    second: Float32,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> tuple[Float32, Float32, Float32]:
    """One FedAdam step.

    ``m <- beta1 m + (1 - beta1) change``, ``v <- beta2 v + (1 - beta2) change^2``, step
    ``learning_rate * m / (sqrt(v) + tau)``; no bias correction, as in the source.

    Args:
        change: Aggregate minus previous value, any shape.
        first: m before the step; zeros at first.
        second: v before the step; ``tau ** 2`` at first (the source asks for at least that).
        learning_rate: Server learning rate, in units of the weights per step; above 0.
        beta1: Decay of m in [0, 1).
        beta2: Decay of v in [0, 1).
        tau: Degree of adaptivity; above 0. Larger is closer to plain averaging.

    Returns:
        What to add to the previous value, m and v after the step; float32.

    Source:
        Reddi et al. 2021, "Adaptive Federated Optimization", https://arxiv.org/abs/2003.00295,
        algorithm 2.
    """
    moved = change.astype(np.float64)
    m = beta1 * first + (1 - beta1) * moved
    v = beta2 * second + (1 - beta2) * moved**2
    step = learning_rate * m / (np.sqrt(v) + tau)
    return step.astype(np.float32), m.astype(np.float32), v.astype(np.float32)
