# SPDX-License-Identifier: Apache-2.0
"""Brain float: 16 bits a weight, the range of float32 and 8 significant bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, refuse_first
from lorikit.quantization.base import Float32

_OVERFLOW = np.uint32(0x7F7F8000).view(np.float32)
"""Smallest magnitude that rounds to infinity in bfloat16."""

UInt16 = npt.NDArray[np.uint16]


class Bf16:
    """Upper half of IEEE binary32, nearest even; part ``values`` uint16 in the tensor's shape.

    Relative error at most 2**-8 for normal values. Magnitudes from 3.3962e38 up are refused.
    """

    name = "bf16"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round to nearest even; ``rng`` is not used."""
        array = finite(values)
        if array.size and max(array.max(), -array.min()) >= _OVERFLOW:
            refuse_first(array, np.abs(array) >= _OVERFLOW, "exceeds bf16; use fp32")
        return Encoded(self.name, array.shape, {"values": nearest_even(array)})

    def decode(self, encoded: Encoded) -> Float32:
        """The values as float32, exactly."""
        check(encoded, self.name, "values")
        return from_upper_halves(part(encoded, "values", np.uint16, encoded.shape))


def away_from_zero(values: Float32) -> UInt16:
    """Upper halves of the values, rounded to the next larger magnitude."""
    bits = values.view(np.uint32) + np.uint32(0xFFFF)
    return (bits >> np.uint32(16)).astype(np.uint16)


def from_upper_halves(halves: UInt16) -> Float32:
    """The float32 values whose upper halves these are, in the same shape."""
    bits = halves.astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def nearest_even(values: Float32) -> UInt16:
    """Upper halves of the values, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16)).astype(np.uint16)
