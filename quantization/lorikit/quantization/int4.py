# SPDX-License-Identifier: Apache-2.0
"""Four-bit integers in blocks, two a byte, the low nibble first.

A code is stored as itself plus eight, the default zero point of onnxruntime's operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, rows_and_columns, size
from lorikit.quantization._rounding import (
    TINY,
    Int8Codes,
    chunks,
    extremes,
    padded_blocks,
    reciprocal,
    round_to_codes,
    scale_blocks,
)
from lorikit.quantization.base import Float32
from lorikit.quantization.bf16 import away_from_zero, from_upper_halves

_ZERO_POINT = 8

_WIRE_BLOCK = 64

_BYTES = np.arange(256)
_PAIRS = np.stack([_BYTES & 15, _BYTES >> 4], axis=1).astype(np.float32) - np.float32(_ZERO_POINT)
"""The two codes of each byte, the low nibble's first, float32 [256, 2]."""

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Int4Rows:
    """Int4 in blocks along each row of the last axis, for base weights.

    Parts: ``codes`` uint8 [rows, blocks, block / 2] and ``scale`` float32 [rows, blocks], where
    rows is the product of all axes but the last and blocks is ceil(columns / block); a last block
    is filled up with zeros. onnxruntime's ``MatMulNBits`` reads the parts as they are,
    ``GatherBlockQuantized`` (quantize_axis 1, bits 4) reads the codes reshaped to
    [rows, blocks * block / 2]. Scales may be negative.
    """

    block: int
    """Values that share a scale; 32, 64 or 128."""

    @property
    def name(self) -> str:
        """``int4-row32``, ``int4-row64`` or ``int4-row128``."""
        return f"int4-row{self.block}"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round each block to its own step, to nearest or stochastically.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        rows, columns = rows_and_columns(array.shape)
        count = -(-columns // self.block)
        codes = np.empty((rows, count, self.block // 2), np.uint8)
        scale = np.empty((rows, count), np.float32)
        for piece in chunks(rows, count * self.block):
            blocks = padded_blocks(array.reshape(rows, columns)[piece], self.block)
            scale[piece] = steps(blocks, is_stochastic=rng is not None)
            codes[piece] = packed(_codes(blocks, reciprocal(scale[piece]), rng))
        return Encoded(self.name, array.shape, {"codes": codes, "scale": scale})

    def decode(self, encoded: Encoded) -> Float32:
        """Codes times the scale of their block.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "scale")
        rows, columns = rows_and_columns(encoded.shape)
        count = -(-columns // self.block)
        codes = part(encoded, "codes", np.uint8, (rows, count, self.block // 2))
        blocks = _unpacked(codes).reshape(rows, count, self.block)
        scale_blocks(blocks, part(encoded, "scale", np.float32, (rows, count)))
        flat = blocks.reshape(rows, count * self.block)[:, :columns]
        return np.ascontiguousarray(flat).reshape(encoded.shape)


class Int4:
    """Int4 in blocks of 64 along the flattened tensor, for the wire: 4.25 bits a weight.

    Parts: ``codes`` uint8 [ceil(n / 2)] and ``scale`` uint16 [ceil(n / 64)], the upper half of the
    float32 step, rounded away from zero so that the largest magnitude still has a code. Scales may
    be negative.
    """

    name = "int4"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round each block to its own step, to nearest or stochastically.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        blocks = padded_blocks(array.reshape(-1), _WIRE_BLOCK)
        codes = np.empty((len(blocks), _WIRE_BLOCK // 2), np.uint8)
        scale = np.empty(len(blocks), np.uint16)
        for piece in chunks(*blocks.shape):
            scale[piece] = away_from_zero(steps(blocks[piece], is_stochastic=rng is not None))
            inverse = reciprocal(from_upper_halves(scale[piece]))
            codes[piece] = packed(_codes(blocks[piece], inverse, rng))
        flat = codes.reshape(-1)[: -(-array.size // 2)]
        return Encoded(self.name, array.shape, {"codes": flat, "scale": scale})

    def decode(self, encoded: Encoded) -> Float32:
        """Codes times the scale of their block.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "scale")
        length = size(encoded.shape)
        codes = part(encoded, "codes", np.uint8, (-(-length // 2),))
        scale = part(encoded, "scale", np.uint16, (-(-length // _WIRE_BLOCK),))
        blocks = padded_blocks(_unpacked(codes), _WIRE_BLOCK)
        scale_blocks(blocks, from_upper_halves(scale))
        return blocks.reshape(-1)[:length].reshape(encoded.shape)


def steps(blocks: Float32, *, is_stochastic: bool) -> Float32:
    """Step of each block, float32 in the shape of ``blocks`` without the last axis.

    The extreme value gets the code -8, so the step is its magnitude / 8 with the opposite sign: one
    level more than with codes in [-7, 7], about 1 dB on normally distributed weights. Where the
    other side would then pass the code 7 by more than the rounding forgives (half a step to
    nearest, nothing if rounding must stay unbiased), the step is absmax / 7.

    Source:
        The step of onnxruntime's ``MatMulNBits`` quantiser, with that exception added.
    """
    highest, lowest = extremes(blocks)
    largest: Float32 = np.maximum(np.maximum(highest, -lowest), _ZERO_POINT * TINY)
    reach = np.float32((7.0 if is_stochastic else 7.5) / 8)
    is_wide = np.minimum(highest, -lowest) > reach * largest
    is_positive = is_wide | (highest <= -lowest)
    divisor = np.where(is_wide, 7, np.where(is_positive, 8, -8)).astype(np.float32)
    return np.divide(largest, divisor, dtype=np.float32)


def _codes(blocks: Float32, inverse: Float32, rng: np.random.Generator | None) -> Int8Codes:
    return round_to_codes(blocks, inverse, lowest=-_ZERO_POINT, highest=_ZERO_POINT - 1, rng=rng)


def packed(codes: Int8Codes) -> UInt8:
    """Two codes a byte along the last axis, which is even."""
    stored = (codes + np.int8(_ZERO_POINT)).view(np.uint8)
    high = np.left_shift(stored[..., 1::2], 4, dtype=np.uint8)
    return np.bitwise_or(stored[..., ::2], high, dtype=np.uint8)


def _unpacked(codes: UInt8) -> Float32:
    """The codes of the flattened bytes as float32 [2 * bytes]."""
    pairs = np.empty((codes.size, 2), np.float32)
    np.take(_PAIRS, codes.reshape(-1), axis=0, out=pairs, mode="clip")
    return pairs.reshape(-1)
