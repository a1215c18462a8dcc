# SPDX-License-Identifier: Apache-2.0
"""Four-bit floating point: a sign, two exponent bits, one fraction bit."""

from __future__ import annotations

import numpy as np

from lorikit.quantization._double import DoubleTableCodec
from lorikit.quantization._table import Table, TableCodec

_MAGNITUDES = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12)

LEVELS = np.concatenate([_MAGNITUDES, np.float32(0) - _MAGNITUDES])
"""Levels by code, scaled to [-1, 1]; code 8 is a second zero.

Source:
    bitsandbytes 0.50, ``functional.get_4bit_type``, bit for bit.
"""

FP4 = TableCodec("fp4", Table(LEVELS))
"""FP4 in the layout of bitsandbytes; onnxruntime's ``MatMulBnb4`` reads it with quant_type 0."""

FP4_DQ = DoubleTableCodec("fp4-dq", Table(LEVELS))
"""FP4 with 8-bit block magnitudes: 4.13 bits a weight."""
