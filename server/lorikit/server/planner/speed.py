# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes.

Four kinds of work, each with its own price: products with frozen weights, which follow the measured
speed of matrix products; de-quantising these weights, once per use and run of the graph, whatever
the number of rows; products of values with values (attention, quadratic in the length), which are
many and small; and all operators that only pass over values, which the memory's speed bounds. All
prices are expressed in operations of the first kind, so that a device's speed scales them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lorikit.server.planner.step import StepShape

DEFAULT_GFLOPS = 20.0
"""Speed assumed of a device that reports none, GFLOP/s."""

MIXING_PRICE = 2.2
"""What an operation costs in a product of values with values, in operations of large products."""

VALUE_PRICE = 23.0
"""Operations that writing one value costs."""

OUTSIDE = -1
"""Layer of what belongs to none: embeddings and head."""

_FORWARD_PRICE = {"fp32": 49.0, "fp16": 60.0, "int8": 60.0, "int4": 140.0, "nf4": 95.0}
_BACKWARD_PRICE = {"fp32": 49.0, "fp16": 55.0, "int8": 55.0, "int4": 120.0, "nf4": 160.0}
"""Operations that reading one number of a matrix costs, by codec and direction.

fp32, with the two prices above, by least squares over the processor time of eight steps of MiniLM
(1 x 32 to 4 x 256 tokens) and of a 135 M Llama, one thread (102 GFLOP/s) of a Zen 4, onnxruntime
1.31: all within 6 %. The other codecs by what ``benchmarks/products.py`` measures beyond fp32,
between the small matrices, which caches hold, and the large ones.
"""

_FAST_FORWARD_PRICE = {"int4": 20.0}
"""The same for ``fast`` kernels, which are quicker than fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Work of a forward pass, in one run of the graph."""

    weights: int = 0
    """Numbers of frozen matrices that are read."""
    products: int = 0
    """Operations of products with them."""
    mixing: int = 0
    """Operations of products of values with values."""
    values: int = 0
    """Numbers that other operators write."""

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            weights=self.weights + other.weights,
            products=self.products + other.products,
            mixing=self.mixing + other.mixing,
            values=self.values + other.values,
        )


class Work(Protocol):
    """What the time of a step depends on; see ``compile.Compiler``."""

    layer_count: int

    def tokens(self, length: int) -> int:
        """Tokens of an example: its length, or the patches of an image."""
        ...

    def operations(self, layers: Sequence[int], step: StepShape) -> Operations:
        """Forward pass of some layers in one run; ``OUTSIDE`` for what belongs to none."""
        ...


def step_flops(work: Work, step: StepShape, batch_size: int) -> int:
    """Floating-point operations of an optimiser step in matrix products."""
    ahead, back = _passes(work, step)
    return (ahead.products + back.products + ahead.mixing + 2 * back.mixing) * _runs(
        step, batch_size
    )


def step_seconds(work: Work, step: StepShape, *, batch_size: int, speed_gflops: float) -> float:
    """Estimated seconds of an optimiser step.

    Args:
        work: Operations of the model.
        step: A run of the graph.
        batch_size: Examples of the optimiser step.
        speed_gflops: Measured speed of float32 matrix products; 0 where unknown.
    """
    ahead, back = _passes(work, step)
    forward_price = _FORWARD_PRICE.get(step.precision, 0.0)
    if step.kernels == "fast":
        forward_price = _FAST_FORWARD_PRICE.get(step.precision, forward_price)
    operations = (
        ahead.products
        + back.products
        + ahead.weights * forward_price
        + back.weights * _BACKWARD_PRICE.get(step.precision, 0.0)
        # A product of two values has a gradient for each; so have most other operators.
        + (ahead.mixing + 2 * back.mixing) * MIXING_PRICE
        + (ahead.values + 2 * back.values) * VALUE_PRICE
    )
    speed = (speed_gflops or DEFAULT_GFLOPS) * 1e9
    return operations * _runs(step, batch_size) / speed


def _passes(work: Work, step: StepShape) -> tuple[Operations, Operations]:
    """What is computed ahead, recomputation included, and what has a backward part."""
    ahead = work.operations((*step.kept_layers, OUTSIDE, *step.recomputed_layers), step)
    return ahead, work.operations((*step.trained_layers, OUTSIDE), step)


def _runs(step: StepShape, batch_size: int) -> int:
    return -(-batch_size // step.micro_batch)
