# SPDX-License-Identifier: Apache-2.0
"""Randomised Hadamard rotation: spreads each value over its block, so that none stands out."""

from __future__ import annotations

import math

import numpy as np

from lorikit.quantization.base import Float32, QuantizationError

_CHUNK = 1 << 16
"""Values transformed at a time."""


def rotated(values: Float32, block: int, rng: np.random.Generator) -> Float32:
    """The flattened values after random signs and a Walsh-Hadamard transform, block by block.

    An orthogonal map: norms and inner products stay, and so does the length. What is left after
    the full blocks is cut into smaller powers of two, the largest first, so that nothing is padded.

    Args:
        values: Float32 of any shape.
        block: Length of a block, a power of two.
        rng: Source of the signs; ``unrotated`` needs an equal one.

    Returns:
        Float32 [n].

    Source:
        Ailon & Chazelle 2009, "The Fast Johnson-Lindenstrauss Transform",
        https://doi.org/10.1137/060673096; for updates Suresh et al. 2017, "Distributed Mean
        Estimation with Limited Communication", https://arxiv.org/abs/1611.00429, section 3.
    """
    flat = values.reshape(-1) * _signs(values.size, rng)
    _transform_blocks(flat, block)
    return flat


def unrotated(values: Float32, block: int, rng: np.random.Generator) -> Float32:
    """The values that ``rotated`` was given, as float32 [n], up to the rounding of float32.

    Args:
        values: Float32 [n].
        block: As it was given there.
        rng: In the state it had there.
    """
    flat = values.reshape(-1).copy()
    _transform_blocks(flat, block)
    flat *= _signs(values.size, rng)
    return flat


def _signs(count: int, rng: np.random.Generator) -> Float32:
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), np.uint8), count=count)
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


def _transform_blocks(flat: Float32, block: int) -> None:
    """Transform full blocks and what is left, in place."""
    if block < 1 or block & (block - 1):
        raise QuantizationError(f"rotation needs blocks of a power of two, got {block}")
    start = 0
    while start < flat.size:
        length = min(block, 1 << (flat.size - start).bit_length() - 1)
        stop = start + (flat.size - start) // length * length
        _transform(flat[start:stop].reshape(-1, length))
        start = stop


def _transform(blocks: Float32) -> None:
    """Multiply each row by the orthonormal Hadamard matrix, in place; its own inverse.

    Rows stand side by side while they are transformed, so that every sum runs along memory, and few
    enough of them that they stay in the processor's cache. Sums have one order, on any machine.
    """
    count, length = blocks.shape
    scale = np.float32(1 / math.sqrt(length))
    stride = max(1, _CHUNK // length)
    for start in range(0, count, stride):
        columns = np.ascontiguousarray(blocks[start : start + stride].T)
        with np.errstate(over="ignore", invalid="ignore"):  # only where a value is not finite
            _add_and_subtract(columns)
        np.multiply(columns.T, scale, out=blocks[start : start + stride])


def _add_and_subtract(columns: Float32) -> None:
    """The transform along the first axis without its scale, in place."""
    length, count = columns.shape
    half = 1
    while half < length:
        pairs = columns.reshape(length // (2 * half), 2, half * count)
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        half *= 2
