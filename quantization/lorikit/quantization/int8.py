# SPDX-License-Identifier: Apache-2.0
"""Eight-bit integers with one scale per row."""

from __future__ import annotations

import numpy as np

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import check, finite, part, rows_and_columns
from lorikit.quantization._rounding import round_to_codes, scaled_codes, steps
from lorikit.quantization.base import Float32

_LEVELS = 127


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
        scale, inverse = steps(rows, _LEVELS)
        codes = round_to_codes(rows, inverse, _LEVELS, rng)
        return Encoded(self.name, array.shape, {"codes": codes, "scale": scale})

    def decode(self, encoded: Encoded) -> Float32:
        """Codes times the scale of their row.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        check(encoded, self.name, "codes", "scale")
        rows, columns = rows_and_columns(encoded.shape)
        codes = part(encoded, "codes", np.int8, (rows, columns))
        scale = part(encoded, "scale", np.float32, (rows,))
        return scaled_codes(codes, scale).reshape(encoded.shape)
