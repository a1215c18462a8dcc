# SPDX-License-Identifier: Apache-2.0
"""Four and eight bits from the same integers: an int4 base that a residual turns into int8.

An 8-bit code is ``16 high + low`` with both nibbles in [-8, 7]. The high ones alone, with a scale
16 times as large, are ``int4-row..``; with the low ones they are ``int8-row..``, so that a device
which holds one of the two reaches the other by half a download, or by none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, rows_and_columns
from lorikit.quantization._rounding import (
    TINY,
    Int8Codes,
    chunks,
    extremes,
    padded_blocks,
    reciprocal,
    round_to_codes,
)
from lorikit.quantization.base import Float32, QuantizationError
from lorikit.quantization.int4 import Int4Rows, packed
from lorikit.quantization.int8 import Int8Rows

UInt8 = npt.NDArray[np.uint8]

RATIO = np.float32(16)
"""Step of the coarse codes over that of the fine ones."""

_LOWEST, _HIGHEST = -128, 119
_ZERO_POINT = 128
_NIBBLE = 8


def nested(values: Float32, block: int = 64) -> Encoded:
    """The values in ``int8-row{block}``, with codes in [-128, 119] that ``coarse`` can cut.

    The step is the larger of what the two extremes of a block need; it is negative where that makes
    it smaller. At most half a step off, which costs up to 0.6 dB of plain ``int8-row..``.

    Args:
        values: Finite float32, blocks along the last axis.
        block: Values that share a scale; 32, 64 or 128.

    Raises:
        QuantizationError: A value is not finite.
    """
    array = finite(values)
    rows, columns = rows_and_columns(array.shape)
    count = -(-columns // block)
    codes = np.empty((rows, count, block), np.uint8)
    scale = np.empty((rows, count), np.float32)
    for piece in chunks(rows, count * block):
        blocks = padded_blocks(array.reshape(rows, columns)[piece], block)
        scale[piece] = _steps(blocks)
        found = round_to_codes(
            blocks, reciprocal(scale[piece]), lowest=_LOWEST, highest=_HIGHEST, rng=None
        )
        codes[piece] = found.view(np.uint8) ^ np.uint8(_ZERO_POINT)
    return Encoded(Int8Rows(block).name, array.shape, {"codes": codes, "scale": scale})


def coarse(fine: Encoded) -> Encoded:
    """The same tensor in ``int4-row..``: the high nibbles of nested codes.

    Raises:
        QuantizationError: Not in ``int8-row..``, or a code above 119, which has no high nibble.
    """
    block, codes, scale = _fine(fine)
    if codes.size and int(codes.max()) > _HIGHEST:
        raise QuantizationError(f"{fine.codec}: codes are not nested; encode with nested()")
    return Encoded(
        Int4Rows(block).name, fine.shape, {"codes": packed(_high(codes)), "scale": scale * RATIO}
    )


def residual(fine: Encoded) -> UInt8:
    """The low nibbles of nested codes, packed as those of int4: [rows, blocks, block / 2]."""
    _, codes, _ = _fine(fine)
    low = (codes.astype(np.int16) - 16 * _high(codes).astype(np.int16)).astype(np.int8)
    return packed(low)


def refined(codes: UInt8, low: UInt8) -> UInt8:
    """Stored 8-bit codes from packed high and low nibbles of the same length.

    Args:
        codes: Codes of ``int4-row..``, any shape.
        low: What ``residual`` gave, as many.

    Returns:
        Codes of ``int8-row..``, flat, twice as many.
    """
    out = np.empty((codes.size, 2), np.uint8)
    high, rest = codes.reshape(-1), low.reshape(-1)
    # Modulo 256: (16 (h - 8) + (l - 8)) + 128 = 16 h + l - 8.
    for place, shift in ((0, 0), (1, 4)):
        nibble, own = (high >> shift) & 15, (rest >> shift) & 15
        out[:, place] = (nibble << 4) + own - np.uint8(_NIBBLE)
    return out.reshape(-1)


def cut(codes: UInt8) -> UInt8:
    """Packed high nibbles of stored 8-bit codes of even number; the inverse of ``refined``."""
    signed = (codes.reshape(-1) ^ np.uint8(_ZERO_POINT)).view(np.int8)
    return packed(_high(signed))


def _fine(encoded: Encoded) -> tuple[int, Int8Codes, Float32]:
    """Block, codes [rows, blocks, block] and scale [rows, blocks] of a tensor in ``int8-row..``."""
    names = {Int8Rows(block).name: block for block in (32, 64, 128)}
    if encoded.codec not in names:
        raise QuantizationError(f"{encoded.codec!r:.80} is not one of {', '.join(names)}")
    block = names[encoded.codec]
    check(encoded, encoded.codec, "codes", "scale")
    rows, columns = rows_and_columns(encoded.shape)
    count = -(-columns // block)
    codes = part(encoded, "codes", np.uint8, (rows, count, block))
    scale = part(encoded, "scale", np.float32, (rows, count))
    return block, (codes ^ np.uint8(_ZERO_POINT)).view(np.int8), scale


def _high(codes: Int8Codes) -> Int8Codes:
    """Nearest multiples of 16, divided by it, in [-8, 7]; ties go up."""
    return ((codes.astype(np.int16) + _NIBBLE) >> 4).astype(np.int8)


def _steps(blocks: Float32) -> Float32:
    """Step of each block: all its values lie in [-128, 119] steps."""
    highest, lowest = extremes(blocks)
    below, above = np.float32(-_LOWEST), np.float32(_HIGHEST)
    upright = np.maximum(highest / above, -lowest / below)
    turned = np.maximum(-lowest / above, highest / below)
    step = np.where(upright <= turned, upright, -turned)
    return np.where(np.abs(step) < TINY, TINY, step).astype(np.float32)
