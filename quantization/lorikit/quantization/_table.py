# SPDX-License-Identifier: Apache-2.0
"""Four-bit codes into a table of 16 levels, in blocks, as bitsandbytes stores them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, size
from lorikit.quantization._rounding import absmax
from lorikit.quantization.base import Float32

BLOCK = 64
"""Values of the flattened tensor that share one largest magnitude."""

_SMALLEST = np.float32(1e-38)
"""What bitsandbytes divides by where a block is smaller."""

_CHUNK = 1 << 16
"""Values encoded at a time: their temporaries stay in the processor's cache."""

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Table:
    """Sixteen levels in [-1, 1], by code."""

    levels: Float32
    """Level of each code, float32 [16]."""
    bounds: Float32 = field(init=False)
    """Midpoints of neighbouring levels, ascending, float32 [15]; on a bound the lower one wins."""
    order: UInt8 = field(init=False)
    """Codes by ascending level, uint8 [16]."""
    pairs: Float32 = field(init=False)
    """The two levels of each byte, the high nibble's first, float32 [256, 2]."""

    def __post_init__(self) -> None:
        order = np.argsort(self.levels, kind="stable")
        ascending = self.levels[order]
        byte = np.arange(256)
        pairs = np.stack([self.levels[byte >> 4], self.levels[byte & 15]], axis=1)
        object.__setattr__(self, "order", order.astype(np.uint8))
        object.__setattr__(self, "bounds", (ascending[:-1] + ascending[1:]) / np.float32(2))
        object.__setattr__(self, "pairs", pairs)


def quantize(values: Float32, table: Table) -> tuple[UInt8, Float32]:
    """Nearest levels of a flat array, as bitsandbytes' CPU kernel computes them.

    A full block is multiplied by the rounded inverse of its largest magnitude, a shorter last block
    is divided by it; the magnitude of a full block is stored as it is, that of a shorter one is at
    least 1e-38. In blocks smaller than that an error may reach 1e-38. An odd length is filled up
    with the code of zero.

    Args:
        values: Finite float32 [n].
        table: Levels.

    Returns:
        Codes uint8 [ceil(n / 2)], the first value in the high nibble, and the largest magnitude of
        each block, float32 [ceil(n / 64)].

    Source:
        bitsandbytes 0.50, ``backends/default/ops.py``, ``quantize_4bit``.
    """
    codes = np.empty(-(-values.size // 2), np.uint8)
    largest = np.empty(-(-values.size // BLOCK), np.float32)
    full = values.size - values.size % BLOCK
    for start in range(0, full, _CHUNK):
        stop = min(start + _CHUNK, full)
        blocks = values[start:stop].reshape(-1, BLOCK)
        maxima = absmax(blocks)
        inverse = np.divide(1, np.maximum(maxima, _SMALLEST), dtype=np.float32)
        largest[start // BLOCK : stop // BLOCK] = maxima
        codes[start // 2 : stop // 2] = _packed((blocks * inverse[:, np.newaxis]).ravel(), table)
    if full < values.size:
        largest[-1] = np.maximum(absmax(values[full:]), _SMALLEST)
        rest = np.zeros(values.size - full + values.size % 2, np.float32)
        np.divide(values[full:], largest[-1], out=rest[: values.size - full])
        codes[full // 2 :] = _packed(rest, table)
    return codes, largest


def dequantize(codes: UInt8, largest: Float32, table: Table, length: int) -> Float32:
    """Level times largest magnitude of its block, float32 [length]; inverse of ``quantize``."""
    padded = np.zeros((largest.size, BLOCK), np.float32)
    flat = padded.reshape(-1)
    pairs = flat[: codes.size * 2].reshape(-1, 2)
    np.take(table.pairs, codes, axis=0, out=pairs, mode="clip")  # "raise" would buffer the output
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        padded *= largest[:, np.newaxis]
    return flat[:length]


@dataclass(frozen=True, slots=True)
class TableCodec:
    """Blocks of 64 along the flattened tensor, one float32 magnitude each: 4.5 bits a weight.

    Parts: ``codes`` uint8 [ceil(n / 2)], two a byte, the first in the high nibble, and ``absmax``
    float32 [ceil(n / 64)].
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
        return Encoded(self.name, array.shape, {"codes": codes, "absmax": largest})

    def decode(self, encoded: Encoded) -> Float32:
        """Level of each code times the largest magnitude of its block.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "absmax")
        length = size(encoded.shape)
        codes = part(encoded, "codes", np.uint8, (-(-length // 2),))
        largest = part(encoded, "absmax", np.float32, (-(-length // BLOCK),))
        return dequantize(codes, largest, self.table, length).reshape(encoded.shape)


def _packed(scaled: Float32, table: Table) -> UInt8:
    """Two codes a byte of an even number of values in [-1, 1]."""
    rank = np.zeros(scaled.size, np.uint8)
    for bound in table.bounds:
        rank += (scaled > bound).view(np.uint8)
    codes = table.order[rank]
    high = np.left_shift(codes[::2], 4, dtype=np.uint8)
    return np.bitwise_or(high, codes[1::2], dtype=np.uint8)
