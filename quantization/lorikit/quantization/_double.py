# SPDX-License-Identifier: Apache-2.0
"""Table codecs whose block magnitudes are themselves quantised, as bitsandbytes stores them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Array, Encoded
from lorikit.quantization._checks import check, finite, part, size
from lorikit.quantization._rounding import TINY, absmax, padded_blocks, reciprocal, scale_blocks
from lorikit.quantization._table import BLOCK, Table, dequantize, quantize
from lorikit.quantization.base import Float32

NESTED_BLOCK = 256
"""Block magnitudes that share one nested magnitude."""


@dataclass(frozen=True, slots=True)
class DoubleTableCodec:
    """Blocks of 64 along the flattened tensor with an 8-bit magnitude each: 4.13 bits a weight.

    Parts: ``codes`` uint8 [ceil(n / 2)] as without double quantisation; ``absmax`` uint8
    [blocks], blocks = ceil(n / 64), codes into ``DYNAMIC_LEVELS``; ``nested_absmax`` float32
    [ceil(blocks / 256)]; ``nested_offset`` float32 [1]. A block's magnitude is level *
    nested_absmax + nested_offset.

    Decoding agrees with bitsandbytes bit for bit. Encoding takes the nearest level, where
    bitsandbytes' CPU kernel looks up a table of 65,536 entries and may take the second nearest, and
    the exact mean as offset, where torch sums in float32.

    Source:
        Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314, section 3.
    """

    name: str
    """Name in plans, manifests and on the wire."""
    table: Table
    """Levels by code."""

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round to the nearest level; ``rng`` is not used.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        codes, largest = quantize(array.reshape(-1), self.table)
        return self.with_magnitudes(array.shape, codes, largest)

    def with_magnitudes(
        self, shape: tuple[int, ...], codes: npt.NDArray[np.uint8], largest: Float32
    ) -> Encoded:
        """The tensor whose codes and block magnitudes these are, its magnitudes quantised.

        Args:
            shape: Of the tensor.
            codes: As the codec without double quantisation stores them.
            largest: Magnitude of each block, float32 [blocks].
        """
        offset = np.float32(largest.mean(dtype=np.float64) if largest.size else 0)
        blocks = padded_blocks(largest - offset, NESTED_BLOCK)
        nested = absmax(blocks)
        scaled = blocks * reciprocal(np.maximum(nested, TINY))[:, np.newaxis]
        parts: dict[str, Array] = {
            "codes": codes,
            "absmax": _nearest(scaled).reshape(-1)[: largest.size],
            "nested_absmax": nested,
            "nested_offset": np.array([offset], np.float32),
        }
        return Encoded(self.name, shape, parts)

    def decode(self, encoded: Encoded) -> Float32:
        """Level of each code times the restored magnitude of its block.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "absmax", "nested_absmax", "nested_offset")
        length = size(encoded.shape)
        codes = part(encoded, "codes", np.uint8, (-(-length // 2),))
        return dequantize(codes, self.magnitudes(encoded), self.table, length).reshape(
            encoded.shape
        )

    def magnitudes(self, encoded: Encoded) -> Float32:
        """The restored magnitude of each block, float32 [blocks].

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "absmax", "nested_absmax", "nested_offset")
        count = -(-size(encoded.shape) // BLOCK)
        absmax_codes = part(encoded, "absmax", np.uint8, (count,))
        nested = part(encoded, "nested_absmax", np.float32, (-(-count // NESTED_BLOCK),))
        offset = part(encoded, "nested_offset", np.float32, (1,))
        blocks = padded_blocks(DYNAMIC_LEVELS[absmax_codes], NESTED_BLOCK)
        scale_blocks(blocks, nested)
        with np.errstate(over="ignore", invalid="ignore"):
            largest: Float32 = blocks.reshape(-1)[:count] + offset
        return largest


def _dynamic_levels() -> Float32:
    """The 256 levels of the signed dynamic 8-bit type, ascending, float32.

    For each of seven decades e = -6 ... 0, 2**(e + 6) midpoints of equal parts of [0.1, 1] times
    10**e with both signs; then 0 and 1.

    Source:
        Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning",
        https://arxiv.org/abs/1511.04561; rounded as bitsandbytes' ``create_dynamic_map`` does.
    """
    levels = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for decade in range(7):
        borders = _linspace(2**decade + 1)
        means = (borders[1:] + borders[:-1]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        levels += [means, -means]
    return np.sort(np.concatenate(levels))


def _linspace(count: int) -> Float32:
    """So many equally spaced values from 0.1 to 1, each half counted from its own end.

    ``torch.linspace`` in float32 with a fused multiply-add: the exact product in float64, rounded
    once.
    """
    start = np.float32(0.1)
    step = np.float64((np.float32(1) - start) / np.float32(count - 1))
    index = np.arange(count)
    values = np.where(index < count // 2, start + step * index, 1 - step * (count - 1 - index))
    return values.astype(np.float32)


DYNAMIC_LEVELS = _dynamic_levels()
"""Levels of the signed dynamic 8-bit type by code, float32 [256]."""

_BOUNDS = (DYNAMIC_LEVELS[1:] + DYNAMIC_LEVELS[:-1]) / np.float32(2)


def _nearest(scaled: Float32) -> npt.NDArray[np.uint8]:
    return np.searchsorted(_BOUNDS, scaled).astype(np.uint8)
