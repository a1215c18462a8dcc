# SPDX-License-Identifier: Apache-2.0
"""NormalFloat 4: sixteen levels for weights that are normally distributed."""

from __future__ import annotations

import numpy as np

from lorikit.quantization._double import DoubleTableCodec
from lorikit.quantization._table import Table, TableCodec

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Quantiles of the standard normal with an exact zero, scaled to [-1, 1], by code.

Source:
    Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314, appendix E; the values are
    those of bitsandbytes, bit for bit.
"""

NF4 = TableCodec("nf4", Table(LEVELS))
"""NF4 in the layout of bitsandbytes; onnxruntime's ``MatMulBnb4`` reads it with quant_type 1."""

NF4_DQ = DoubleTableCodec("nf4-dq", Table(LEVELS))
"""NF4 with 8-bit block magnitudes: 4.13 bits a weight."""
