# SPDX-License-Identifier: Apache-2.0
"""Half precision: 16 bits a weight, 11 of them significant."""

from __future__ import annotations

import numpy as np

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, refuse_first
from lorikit.quantization.base import Float32

_OVERFLOW = 65520.0
"""Smallest magnitude that rounds to infinity in binary16."""


class Fp16:
    """IEEE binary16, nearest even; part ``values`` float16 in the tensor's shape.

    Relative error at most 2**-11 from 2**-14 up, absolute error at most 2**-25 below. Values from
    65520 up are refused.
    """

    name = "fp16"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round to nearest even; ``rng`` is not used."""
        array = finite(values)
        if array.size and max(array.max(), -array.min()) >= _OVERFLOW:
            refuse_first(array, np.abs(array) >= _OVERFLOW, "exceeds fp16; use bf16")
        with np.errstate(under="ignore"):
            return Encoded(self.name, array.shape, {"values": array.astype(np.float16)})

    def decode(self, encoded: Encoded) -> Float32:
        """The values as float32, exactly."""
        check(encoded, self.name, "values")
        return part(encoded, "values", np.float16, encoded.shape).astype(np.float32)
