# SPDX-License-Identifier: Apache-2.0
"""Eight-bit integers, with one scale per row or per block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, rows_and_columns, size
from lorikit.quantization._rounding import (
    Int8Codes,
    chunks,
    padded_blocks,
    reciprocal,
    round_to_codes,
    scale_blocks,
    symmetric_steps,
)
from lorikit.quantization.base import Float32
from lorikit.quantization.bf16 import away_from_zero, from_upper_halves

_LEVELS = 127

_BLOCK = 64

_ZERO_POINT = 128
"""What the blocked codes for base weights are stored beyond themselves."""


class Int8:
    """Symmetric int8 per row of the last axis: x is about scale * code, code in [-127, 127].

    Parts: ``codes`` int8 [rows, columns] and ``scale`` float32 [rows], where columns is the last
    axis and rows all others together. ONNX ``DequantizeLinear`` with axis 0 and no zero point reads
    it. The codes are those of bitsandbytes' ``int8_vectorwise_quant``, whose row statistic is 127
    times the scale. Meant for base weights; short rows pay 32 bits each for their scale, so updates
    travel better as ``int8-block64``.
    """

    name = "int8"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round each row to its own step, to nearest or stochastically.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        rows = array.reshape(rows_and_columns(array.shape))
        codes = np.empty(rows.shape, np.int8)
        scale = np.empty(rows.shape[0], np.float32)
        for piece in chunks(*rows.shape):
            scale[piece], inverse = symmetric_steps(rows[piece], _LEVELS)
            codes[piece] = _codes(rows[piece], inverse, rng)
        return Encoded(self.name, array.shape, {"codes": codes, "scale": scale})

    def decode(self, encoded: Encoded) -> Float32:
        """Codes times the scale of their row.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "scale")
        rows, columns = rows_and_columns(encoded.shape)
        values = part(encoded, "codes", np.int8, (rows, columns)).astype(np.float32)
        scale_blocks(values, part(encoded, "scale", np.float32, (rows,)))
        return values.reshape(encoded.shape)


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Int8 in blocks along each row of the last axis, for base weights with outliers in a row.

    Parts: ``codes`` uint8 [rows, blocks, block], each code plus 128, and ``scale`` float32 [rows,
    blocks], where rows is the product of all axes but the last and blocks is ceil(columns / block);
    a last block is filled up with zeros. onnxruntime's ``MatMulNBits`` with 8 bits reads the parts
    as they are.
    """

    block: int
    """Values that share a scale; 32, 64 or 128."""

    @property
    def name(self) -> str:
        """``int8-row32``, ``int8-row64`` or ``int8-row128``."""
        return f"int8-row{self.block}"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round each block to its own step, to nearest or stochastically.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        rows, columns = rows_and_columns(array.shape)
        count = -(-columns // self.block)
        codes = np.empty((rows, count, self.block), np.uint8)
        scale = np.empty((rows, count), np.float32)
        for piece in chunks(rows, count * self.block):
            blocks = padded_blocks(array.reshape(rows, columns)[piece], self.block)
            scale[piece], inverse = symmetric_steps(blocks, _LEVELS)
            codes[piece] = _codes(blocks, inverse, rng).view(np.uint8) ^ np.uint8(_ZERO_POINT)
        return Encoded(self.name, array.shape, {"codes": codes, "scale": scale})

    def decode(self, encoded: Encoded) -> Float32:
        """Codes times the scale of their block.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "scale")
        rows, columns = rows_and_columns(encoded.shape)
        count = -(-columns // self.block)
        codes = part(encoded, "codes", np.uint8, (rows, count, self.block))
        blocks = (codes ^ np.uint8(_ZERO_POINT)).view(np.int8).astype(np.float32)
        scale_blocks(blocks, part(encoded, "scale", np.float32, (rows, count)))
        flat = blocks.reshape(rows, count * self.block)[:, :columns]
        return np.ascontiguousarray(flat).reshape(encoded.shape)


class Int8Blocks:
    """Symmetric int8 in blocks of 64 along the flattened tensor, for the wire: 8.25 bits a weight.

    Parts: ``codes`` int8 [n] and ``scale`` uint16 [ceil(n / 64)], the upper half of the float32
    step, rounded up so that the largest magnitude still has a code.
    """

    name = "int8-block64"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round each block to its own step, to nearest or stochastically.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        blocks = padded_blocks(array.reshape(-1), _BLOCK)
        codes = np.empty(blocks.shape, np.int8)
        scale = np.empty(len(blocks), np.uint16)
        for piece in chunks(*blocks.shape):
            step, _ = symmetric_steps(blocks[piece], _LEVELS)
            scale[piece] = away_from_zero(step)
            codes[piece] = _codes(blocks[piece], reciprocal(from_upper_halves(scale[piece])), rng)
        flat = codes.reshape(-1)[: array.size]
        return Encoded(self.name, array.shape, {"codes": flat, "scale": scale})

    def decode(self, encoded: Encoded) -> Float32:
        """Codes times the scale of their block.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "scale")
        length = size(encoded.shape)
        codes = part(encoded, "codes", np.int8, (length,))
        scale = part(encoded, "scale", np.uint16, (-(-length // _BLOCK),))
        blocks = padded_blocks(codes.astype(np.float32), _BLOCK)
        scale_blocks(blocks, from_upper_halves(scale))
        return blocks.reshape(-1)[:length].reshape(encoded.shape)


def _codes(blocks: Float32, inverse: Float32, rng: np.random.Generator | None) -> Int8Codes:
    return round_to_codes(blocks, inverse, lowest=-_LEVELS, highest=_LEVELS, rng=rng)
