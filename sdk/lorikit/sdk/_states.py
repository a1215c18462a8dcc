# SPDX-License-Identifier: Apache-2.0
"""Optimiser states in 8 bits: blocks of numbers on a scale that is fine near zero.

Source:
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
    https://arxiv.org/abs/2110.02861, sections 2.1 (blocks) and 2.2 (dynamic tree quantisation).
    The levels are those of bitsandbytes. Two things differ. A block's scale carries the sign of its
    largest element, so that this element is exact whatever its sign. And a second moment above
    zero stays above zero: rounded to zero, it let the next step divide by epsilon alone, which made
    a model with rare words diverge.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Float32

BLOCK = 256
"""Numbers that share a scale."""

SMALLEST = 4096
"""Tensors of fewer elements keep 32 bits: they cost little, and biases hang on precision."""

Codes = npt.NDArray[np.uint8]


@cache
def levels(*, is_signed: bool) -> Float32:
    """The 256 values that a code stands for, ascending, in -1 ... 1 or 0 ... 1.

    Decades from 1e-6 to 1, each with twice the steps of the one below.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2 ** (exponent + (0 if is_signed else 1))
        bounds = np.linspace(0.1, 1, steps + 1)
        middles = (bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (exponent - 6)
        values.extend(middles)
        if is_signed:
            values.extend(-middles)
    return np.sort(np.array(values, np.float32))


@cache
def _borders(*, is_signed: bool) -> Float32:
    """Middles between neighbouring levels."""
    table = levels(is_signed=is_signed)
    result: Float32 = (table[:-1] + table[1:]) / np.float32(2)
    return result


def quantized(values: Float32, *, is_signed: bool, block: int = BLOCK) -> tuple[Codes, Float32]:
    """Nearest codes, in the shape of the values, and the scale of each block.

    Args:
        values: Float32, any shape; finite.
        is_signed: Whether values can be negative.
        block: Numbers that share a scale.
    """
    flat = values.reshape(-1)
    blocks = -(-flat.size // block)
    padded = np.zeros(blocks * block, np.float32)
    padded[: flat.size] = flat
    rows = padded.reshape(blocks, block)
    largest = np.abs(rows).argmax(axis=1)
    scales: Float32 = rows[np.arange(blocks), largest]
    divisor = np.where(scales == 0, np.float32(1), scales)
    rows /= divisor[:, None]
    codes = np.searchsorted(_borders(is_signed=is_signed), rows).astype(np.uint8)
    if not is_signed:
        codes[(codes == 0) & (rows > 0)] = 1
    return codes.reshape(-1)[: flat.size].reshape(values.shape), scales


def dequantized(codes: Codes, scales: Float32, *, is_signed: bool, block: int = BLOCK) -> Float32:
    """The values that codes and scales stand for, in the shape of the codes."""
    values = levels(is_signed=is_signed)[codes.reshape(-1)]
    values *= np.repeat(scales, block)[: values.size]
    result: Float32 = values.reshape(codes.shape)
    return result
