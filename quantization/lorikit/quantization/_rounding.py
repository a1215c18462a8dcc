# SPDX-License-Identifier: Apache-2.0
"""Steps of symmetric integer codecs, and rounding to them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lorikit.quantization.base import Float32

TINY = np.float32(np.finfo(np.float32).tiny)
"""Smallest step: the smallest normal float32, so that a step and its inverse are both normal."""


def absmax(blocks: Float32) -> Float32:
    """Largest magnitude along the last axis, float32, zero where it is empty."""
    if blocks.shape[-1] == 0:
        return np.zeros(blocks.shape[:-1], np.float32)
    largest: Float32 = np.abs(np.maximum(blocks.max(axis=-1), -blocks.min(axis=-1)))
    return largest


def steps(blocks: Float32, levels: int) -> tuple[Float32, Float32]:
    """Step of each block, and its inverse.

    Args:
        blocks: Values, blocks along the last axis.
        levels: Largest code; 127 for 8 bits, 7 for 4 bits.

    Returns:
        The step absmax / levels, at least ``TINY``, and levels / absmax, both float32 in the shape
        of ``blocks`` without the last axis. A block below levels * ``TINY`` (denormal or zero) has
        the step ``TINY``, so that the error is never more than half a step.
    """
    largest = np.maximum(absmax(blocks), np.float32(levels) * TINY)
    step = np.divide(largest, levels, dtype=np.float32)
    return step, np.divide(levels, largest, dtype=np.float32)


def round_to_codes(
    blocks: Float32, inverse: Float32, levels: int, rng: np.random.Generator | None
) -> npt.NDArray[np.int8]:
    """Integer codes in [-levels, levels], in the shape of ``blocks``.

    With a generator, v = x * inverse becomes floor(v + u) with u uniform in [0, 1): its expectation
    is v, its variance at most 1/4. Without, v is rounded to nearest, ties to even.

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
    np.clip(scaled, -levels, levels, out=scaled)
    return scaled.astype(np.int8)


def scaled_codes(codes: npt.NDArray[np.int8], scale: Float32) -> Float32:
    """Codes times the scale of their block, float32; not finite only where the scale is not."""
    values = codes.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        values *= scale[..., np.newaxis]
    return values
