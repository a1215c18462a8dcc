# SPDX-License-Identifier: Apache-2.0
"""Full precision: 32 bits a weight, exact."""

from __future__ import annotations

import numpy as np

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part
from lorikit.quantization.base import Float32


class Fp32:
    """IEEE binary32; part ``values`` float32 in the tensor's shape."""

    name = "fp32"

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """The values as they are; ``rng`` is not used."""
        array = finite(values)
        return Encoded(self.name, array.shape, {"values": array})

    def decode(self, encoded: Encoded) -> Float32:
        """The values, bit for bit; they share memory with the part."""
        check(encoded, self.name, "values")
        return part(encoded, "values", np.float32, encoded.shape)
