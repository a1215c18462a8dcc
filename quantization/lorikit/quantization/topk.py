# SPDX-License-Identifier: Apache-2.0
"""The largest magnitudes of a tensor alone, with the gaps between them, for the wire."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Array, Encoded
from lorikit.quantization._checks import check, finite, part, size
from lorikit.quantization.base import Float32, QuantizationError
from lorikit.quantization.int8 import Int8Blocks

_MAX_GAP_BYTES = 6
"""Bytes of the longest gap: 42 bits, more than any tensor has elements."""

_MAX_SPREAD = 1 << 26
"""Most elements for each kept value; keeps a few bytes from asking for all memory."""

_VALUES = Int8Blocks()

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TopK:
    """The largest magnitudes in 8 bits each, zero elsewhere: about 17 bits for each that is kept.

    Parts: ``gaps`` uint8, for each kept value in order the number of dropped ones before it, seven
    bits a byte, the lowest first, the high bit set on all bytes but a gap's last; ``codes`` int8
    [kept] and ``scale`` uint16 [ceil(kept / 64)] of the kept values as in ``int8-block64``. Among
    equal magnitudes the first ones stay.

    Biased whatever the rounding: use it with error feedback.

    Source:
        Stich et al. 2018, "Sparsified SGD with Memory", https://arxiv.org/abs/1809.07599; gaps as
        in LEB128.
    """

    share: float
    """Share of the elements that is kept, rounded up; decoding does not depend on it."""

    name = "topk"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise QuantizationError(f"topk: share must lie in (0, 1], got {self.share}")

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Keep the largest magnitudes, rounded to nearest or stochastically.

        Raises:
            QuantizationError: A value is not finite.
        """
        array = finite(values)
        flat = array.reshape(-1)
        places = _largest(flat, math.ceil(self.share * flat.size))
        kept = _VALUES.encode(flat[places], rng=rng)
        gaps = _to_bytes(np.diff(places, prepend=-1) - 1)
        return Encoded(self.name, array.shape, {"gaps": gaps, **kept.parts})

    def decode(self, encoded: Encoded) -> Float32:
        """The kept values at their places, zero elsewhere.

        Raises:
            QuantizationError: Parts missing, of another type, or gaps that do not fit the shape.
        """
        check(encoded, self.name, "gaps", "codes", "scale")
        length = size(encoded.shape)
        codes = encoded.parts["codes"]
        if length > _MAX_SPREAD * max(codes.size, 1):
            raise QuantizationError(f"topk: {codes.size} values cannot fill {encoded.shape}")
        if codes.ndim != 1 or codes.size > length:
            raise QuantizationError(
                f"topk: part 'codes' is {codes.dtype} {codes.shape}, but the shape {encoded.shape} "
                f"needs int8 of at most {length}"
            )
        parts: dict[str, Array] = {"codes": codes, "scale": encoded.parts["scale"]}
        kept = _VALUES.decode(Encoded(_VALUES.name, codes.shape, parts))
        places = _places(_gap_bytes(encoded), codes.size, length)
        values = np.zeros(length, np.float32)
        values[places] = kept
        return values.reshape(encoded.shape)


def _largest(values: Float32, count: int) -> Int64:
    """Indices of so many largest magnitudes, ascending; among equals the first."""
    if count >= values.size:
        return np.arange(values.size)
    magnitudes = np.abs(values)
    bound = np.partition(magnitudes, values.size - count)[values.size - count]
    above = np.flatnonzero(magnitudes > bound)
    equal = np.flatnonzero(magnitudes == bound)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _to_bytes(gaps: Int64) -> UInt8:
    """Seven bits a byte, the lowest first."""
    width = np.ones(gaps.size, np.int64)
    for byte in range(1, _MAX_GAP_BYTES):
        width += gaps >= 1 << 7 * byte
    starts = np.cumsum(width) - width
    out = np.empty(int(width.sum()), np.uint8)
    for byte in range(int(width.max(initial=0))):
        chosen = width > byte
        more = (width[chosen] > byte + 1).astype(np.int64) << 7
        out[starts[chosen] + byte] = (gaps[chosen] >> 7 * byte) & 127 | more
    return out


def _gap_bytes(encoded: Encoded) -> UInt8:
    count = encoded.parts["gaps"].size
    return part(encoded, "gaps", np.uint8, (count,))


def _places(data: UInt8, count: int, length: int) -> Int64:
    """The indices that the gaps lead to, strictly ascending and below ``length``.

    Raises:
        QuantizationError: Not so many gaps, an endless one, or one that leads out of the tensor.
    """
    is_last = data < 128
    ends = np.flatnonzero(is_last)
    if ends.size != count or (data.size and not is_last[-1]):
        raise QuantizationError(f"topk: part 'gaps' holds {ends.size} gaps for {count} values")
    starts = np.concatenate([[0], ends[:-1] + 1]) if count else np.zeros(0, np.int64)
    widths = ends - starts + 1
    if widths.max(initial=0) > _MAX_GAP_BYTES:
        raise QuantizationError(f"topk: a gap takes more than {_MAX_GAP_BYTES} bytes")
    gaps = np.zeros(count, np.int64)
    for byte in range(int(widths.max(initial=0))):
        chosen = widths > byte
        gaps[chosen] |= (data[starts[chosen] + byte].astype(np.int64) & 127) << 7 * byte
    if gaps.max(initial=0) >= length and count:
        raise QuantizationError(f"topk: a gap of {gaps.max()} leaves a tensor of {length}")
    places: Int64 = np.cumsum(gaps + 1) - 1
    if count and places[-1] >= length:
        raise QuantizationError(f"topk: the gaps lead to {places[-1]} in a tensor of {length}")
    return places
