# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes: products with frozen weights, and what it costs to read these.

A product with a stored matrix takes the time of its multiplications plus, once per run of the graph
and whatever the number of rows, the time to de-quantise the matrix. Both scale with the speed of
the device, so the second is expressed in multiplications too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lorikit.server.planner.step import StepShape

EFFICIENCY = 0.5
"""Share of the measured matrix-product speed that a training step reaches."""

DEFAULT_GFLOPS = 20.0
"""Speed assumed of a device that reports none, GFLOP/s."""

_FORWARD_COST = {"fp32": 0.0, "fp16": 41.0, "int8": 81.0, "int4": 145.0, "nf4": 103.0}
_BACKWARD_COST = {"fp32": 0.0, "fp16": 41.0, "int8": 81.0, "int4": 145.0, "nf4": 560.0}
"""Operations that de-quantising one element costs, by codec: its time beyond that of the fp32
product, times the speed of that product (165 GFLOP/s). Measured with a 5632 x 2048 matrix and 128
rows on two cores of a Zen 4, onnxruntime 1.31: fp32 17.8 ms, int8 23.5, int4 28, nf4 25 forward and
57 backward; fp16 by its bytes."""

_FAST_FORWARD_COST = {"int4": 10.0}
"""The same for ``fast`` kernels: int4 18.5 ms."""


class Work(Protocol):
    """What the time of a step depends on; see ``compile.Compiler``."""

    layer_count: int

    def flops_per_token(self, lowest_trained_layer: int, kept_layers: Sequence[int]) -> int:
        """Floating-point operations of a training step per token."""
        ...


def step_flops(work: Work, step: StepShape, batch_size: int) -> int:
    """Operations of an optimiser step in products with frozen weights."""
    return sum(_token_flops(work, step)) * batch_size * step.length


def _token_flops(work: Work, step: StepShape) -> tuple[int, int]:
    """Operations per token: of the forward pass, recomputation included, and of the backward."""
    nothing_trains = work.layer_count
    forward = work.flops_per_token(nothing_trains, step.kept_layers)
    backward = work.flops_per_token(step.lowest_trained_layer, step.kept_layers) - forward
    again = work.flops_per_token(nothing_trains, step.recomputed_layers)
    return forward + again, backward


def step_seconds(work: Work, step: StepShape, *, batch_size: int, speed_gflops: float) -> float:
    """Estimated seconds of an optimiser step.

    Args:
        work: Operations of the model.
        step: A run of the graph.
        batch_size: Examples of the optimiser step.
        speed_gflops: Measured speed of float32 matrix products; 0 where unknown.
    """
    forward, backward = _token_flops(work, step)
    ahead = _FORWARD_COST.get(step.precision, 0.0)
    if step.kernels == "fast":
        ahead = _FAST_FORWARD_COST.get(step.precision, ahead)
    # A weight takes part with two operations a token, so half of them is the number of elements.
    reading = forward / 2 * ahead + backward / 2 * _BACKWARD_COST.get(step.precision, 0.0)
    runs = -(-batch_size // step.micro_batch)
    operations = (forward + backward) * batch_size * step.length + reading * runs
    return operations / ((speed_gflops or DEFAULT_GFLOPS) * 1e9 * EFFICIENCY)
