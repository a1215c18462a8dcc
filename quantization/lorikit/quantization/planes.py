# SPDX-License-Identifier: Apache-2.0
"""Integers of one to seven bits in blocks, as bit planes, for the wire.

A code c of b bits stands for the odd number 2 c - (2**b - 1): as many levels on either side of zero
and none on it, so that one bit is a sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, size
from lorikit.quantization._rounding import TINY, absmax, chunks, padded_blocks, scale_blocks
from lorikit.quantization.base import Float32
from lorikit.quantization.bf16 import away_from_zero, from_upper_halves, nearest_even

_LARGEST_SCALE = np.uint32(0x7F7F0000).view(np.float32)
"""Largest float32 whose lower half is zero."""

_GAUSSIAN_HALF_STEPS: Mapping[int, float] = MappingProxyType(
    {1: 0.7979, 2: 0.4979, 3: 0.2930, 4: 0.1676, 5: 0.0941, 6: 0.0520, 7: 0.0284}
)
"""Half of the step with the least error on N(0, 1), by bits.

Source:
    Max 1960, "Quantizing for Minimum Distortion", https://doi.org/10.1109/TIT.1960.1057548,
    table II (uniform quantisers).
"""

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BitPlanes:
    """Codes of a few bits in blocks along the flattened tensor.

    Parts: ``planes`` uint8 [bits, ceil(n / 8)], the most significant bit's plane first, eight
    values a byte, the first in the highest bit; ``scale`` uint16 [ceil(n / block)], the upper half
    of a float32. A value is its odd number times the scale of its block.

    To nearest, the scale is the least-squares one for the codes, so that the error of a block is
    never longer than the block itself: what error feedback needs to converge, even at one bit.
    Stochastic rounding must reach the largest magnitude and spreads the levels over it, which costs
    a large error at one and two bits; rotate first.
    """

    bits: int
    """Bits of a code, 1 to 7."""
    block: int
    """Values that share a scale; a multiple of 8."""

    @property
    def name(self) -> str:
        """``int1``, ``int2`` and so on."""
        return f"int{self.bits}"

    @property
    def _levels(self) -> int:
        return 1 << self.bits

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round each block to its own levels, with the least squared error or stochastically.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        flat = array.reshape(-1)
        full = flat.size - flat.size % self.block
        codes = np.empty(flat.size, np.uint8)
        scale = np.empty(-(-flat.size // self.block), np.uint16)
        blocks = flat[:full].reshape(-1, self.block)
        for piece in chunks(*blocks.shape):
            span = slice(piece.start * self.block, piece.stop * self.block)
            found, scale[piece] = self._rounded(blocks[piece], rng)
            codes[span] = found.reshape(-1)
        if full < flat.size:
            found, scale[-1:] = self._rounded(flat[np.newaxis, full:], rng)
            codes[full:] = found.reshape(-1)
        return Encoded(self.name, array.shape, {"planes": self._split(codes), "scale": scale})

    def decode(self, encoded: Encoded) -> Float32:
        """The odd number of each code times the scale of its block.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "planes", "scale")
        length = size(encoded.shape)
        planes = part(encoded, "planes", np.uint8, (self.bits, -(-length // 8)))
        scale = part(encoded, "scale", np.uint16, (-(-length // self.block),))
        codes = np.zeros(length, np.uint8)
        for plane in planes:
            codes += codes
            codes += np.unpackbits(plane, count=length)
        blocks = padded_blocks(self._odd(codes), self.block)
        scale_blocks(blocks, from_upper_halves(scale))
        return blocks.reshape(-1)[:length].reshape(encoded.shape)

    def _odd(self, codes: UInt8) -> Float32:
        odd: Float32 = np.arange(1 - self._levels, self._levels, 2, dtype=np.float32)[codes]
        return odd

    def _split(self, codes: UInt8) -> UInt8:
        shifts = range(self.bits - 1, -1, -1)
        return np.stack([np.packbits((codes >> shift) & 1) for shift in shifts])

    def _rounded(
        self, blocks: Float32, rng: np.random.Generator | None
    ) -> tuple[UInt8, npt.NDArray[np.uint16]]:
        """Codes in the shape of the blocks, and the upper half of each block's scale."""
        largest = absmax(blocks)
        if rng is not None:
            scale = away_from_zero(np.divide(largest, self._levels - 1, dtype=np.float32))
            return self._codes(blocks, from_upper_halves(scale), rng), scale
        largest = np.maximum(largest, TINY)
        # The squares of values within [-1, 1] do not overflow.
        unit = np.divide(blocks, largest[:, np.newaxis], dtype=np.float32)
        codes, scales = self._least_squares(unit)
        return codes, nearest_even(np.minimum(scales * largest, _LARGEST_SCALE))

    def _least_squares(self, unit: Float32) -> tuple[UInt8, Float32]:
        """Codes of blocks within [-1, 1], and the scale of each with the least squared error.

        Two steps are tried, the one for normally distributed values and the one that reaches the
        largest magnitude; the better one wins block by block. With the codes' odd numbers q the
        scale <x, q> / <q, q> leaves ||x||^2 - <x, q>^2 / <q, q>.
        """
        power = np.sqrt(np.einsum("ij,ij->i", unit, unit) / np.float32(unit.shape[1]))
        half_steps = [power * np.float32(_GAUSSIAN_HALF_STEPS[self.bits])]
        if self.bits > 1:
            reach = np.where(power > 0, 1 / (self._levels - 1), 0)
            half_steps.append(reach.astype(np.float32))
        best_codes = np.zeros(unit.shape, np.uint8)
        best_scale = np.zeros(len(unit), np.float32)
        best_gain = np.full(len(unit), -1, np.float32)
        for half_step in half_steps:
            codes = self._codes(unit, half_step, None)
            odd = self._odd(codes)
            product = np.einsum("ij,ij->i", unit, odd)
            scale = product / np.einsum("ij,ij->i", odd, odd)
            is_better = scale * product > best_gain
            best_codes[is_better] = codes[is_better]
            best_scale[is_better] = scale[is_better]
            best_gain[is_better] = (scale * product)[is_better]
        return best_codes, best_scale

    def _codes(self, blocks: Float32, half_step: Float32, rng: np.random.Generator | None) -> UInt8:
        safe = np.where(half_step > 0, half_step, 1)
        scaled = blocks * np.divide(0.5, safe, dtype=np.float32)[:, np.newaxis]
        if rng is None:
            scaled += np.float32(self._levels / 2)
        else:
            scaled += np.float32((self._levels - 1) / 2)
            scaled += rng.random(scaled.shape, dtype=np.float32)
        np.floor(scaled, out=scaled)
        np.clip(scaled, 0, self._levels - 1, out=scaled)
        return scaled.astype(np.uint8)


INT1 = BitPlanes(1, 128)
"""A sign and a mean magnitude: 1.125 bits a weight."""

INT2 = BitPlanes(2, 64)
"""Four levels: 2.25 bits a weight."""

INT3 = BitPlanes(3, 64)
"""Eight levels: 3.25 bits a weight."""

INT6 = BitPlanes(6, 64)
"""Sixty-four levels: 6.25 bits a weight."""
