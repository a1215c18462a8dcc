# SPDX-License-Identifier: Apache-2.0
"""Largest magnitudes, steps and codes of symmetric integer codecs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lorikit.quantization.base import Float32

TINY = np.float32(np.finfo(np.float32).tiny)
"""Smallest step: the smallest normal float32, so that a step and its inverse are both normal."""

_CHUNK = 1 << 17
"""Values rounded at a time: their temporaries stay in the processor's cache."""

Int8Codes = npt.NDArray[np.int8]


def absmax(blocks: Float32) -> Float32:
    """Largest magnitude along the last axis, float32, zero where it is empty."""
    highest, lowest = extremes(blocks)
    largest: Float32 = np.abs(np.maximum(highest, -lowest))  # the maximum of two zeros may be -0
    return largest


def extremes(blocks: Float32) -> tuple[Float32, Float32]:
    """The highest value (at least zero) and the lowest (at most zero) along the last axis."""
    zero = np.float32(0)
    highest: Float32 = blocks.max(axis=-1, initial=zero)
    lowest: Float32 = blocks.min(axis=-1, initial=zero)
    return highest, lowest


def symmetric_steps(blocks: Float32, levels: int) -> tuple[Float32, Float32]:
    """Step of each block for codes in [-levels, levels], and its inverse.

    The step is absmax / levels. A block below levels * ``TINY`` (denormal or zero) gets the step
    ``TINY``, so that no error is larger than half a step.

    Args:
        blocks: Values, blocks along the last axis.
        levels: Largest code.

    Returns:
        Both float32 in the shape of ``blocks`` without the last axis.
    """
    largest = np.maximum(absmax(blocks), np.float32(levels) * TINY)
    step = np.divide(largest, levels, dtype=np.float32)
    return step, reciprocal(largest) * np.float32(levels)  # in two steps, as bitsandbytes rounds


def reciprocal(steps: Float32) -> Float32:
    """One over each step, float32."""
    return np.divide(1, steps, dtype=np.float32)


def chunks(blocks: int, block: int) -> Iterator[slice]:
    """Slices over so many blocks of that length, each a cache-sized piece of work."""
    stride = max(1, _CHUNK // max(1, block))
    for start in range(0, blocks, stride):
        yield slice(start, min(start + stride, blocks))


def round_to_codes(
    blocks: Float32,
    inverse: Float32,
    *,
    lowest: int,
    highest: int,
    rng: np.random.Generator | None,
) -> Int8Codes:
    """Integer codes in [lowest, highest], in the shape of ``blocks``.

    With a generator, v = x * inverse becomes floor(v + u) with u uniform in [0, 1): its expectation
    is v, its variance at most 1/4. Without, v is rounded to nearest, ties to even.

    Args:
        blocks: Values, blocks along the last axis.
        inverse: One over the step of each block.
        lowest: Smallest code.
        highest: Largest code.
        rng: Source of u, or None.

    Source:
        Stochastic rounding as in Alistarh et al. 2017, "QSGD", https://arxiv.org/abs/1610.02132,
        with the largest magnitude in place of the norm.
    """
    scaled = blocks * inverse[..., np.newaxis]
    if rng is None:
        np.rint(scaled, out=scaled)
    else:
        scaled += rng.random(scaled.shape, dtype=np.float32)
        np.floor(scaled, out=scaled)
    np.clip(scaled, lowest, highest, out=scaled)
    return scaled.astype(np.int8)


def scale_blocks(blocks: Float32, scale: Float32) -> None:
    """Multiply each block by its scale, in place; not finite only where the scale is not."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        blocks *= scale[..., np.newaxis]


def padded_blocks(values: Float32, block: int) -> Float32:
    """The last axis cut into blocks, [..., blocks, block], filled up with zeros where it ends."""
    length = values.shape[-1]
    count = -(-length // block)
    if length == count * block:
        return values.reshape(*values.shape[:-1], count, block)
    padded = np.zeros((*values.shape[:-1], count * block), np.float32)
    padded[..., :length] = values
    return padded.reshape(*values.shape[:-1], count, block)
