# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 4-bit kernels; the one module of the device that imports it."""

from __future__ import annotations

import bitsandbytes
import torch
from torch import Tensor

assert bitsandbytes.__version__, "importing it registers the operators"


def dequantized(
    codes: Tensor, absmax: Tensor, shape: tuple[int, ...], *, block: int, kind: str
) -> Tensor:
    """Values of a packed weight, float32 in ``shape``.

    Args:
        codes: uint8, two values each, the first in the high nibble.
        absmax: Largest magnitude of each block, float32.
        shape: Of the weight.
        block: Values that share a magnitude.
        kind: ``nf4`` or ``fp4``.
    """
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes.reshape(-1, 1), absmax.reshape(-1), block, kind, list(shape), torch.float32
    )
    return values
