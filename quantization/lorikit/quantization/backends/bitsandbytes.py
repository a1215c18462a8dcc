# SPDX-License-Identifier: Apache-2.0
"""Base codecs computed by bitsandbytes; the result is the same, bit for bit.

Server only. bitsandbytes spreads a tensor over all cores, the numpy codecs use one; and where the
two disagree, one of them is wrong, which is what the tests look for.
"""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes.functional
import numpy as np
import torch

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import finite, rows_and_columns
from lorikit.quantization._rounding import TINY
from lorikit.quantization._table import BLOCK
from lorikit.quantization.base import Codec, Float32, QuantizationError
from lorikit.quantization.fp4 import FP4
from lorikit.quantization.int8 import Int8
from lorikit.quantization.nf4 import NF4

_INT8 = Int8()

_NUMPY: dict[str, Codec] = {each.name: each for each in (FP4, _INT8, NF4)}


@dataclass(frozen=True, slots=True)
class BitsandbytesCodec:
    """``nf4``, ``fp4`` or ``int8``, encoded by bitsandbytes on the CPU and decoded by numpy."""

    name: str
    """Name of the codec, the same as that of the numpy codec."""

    def __post_init__(self) -> None:
        if self.name not in _NUMPY:
            raise QuantizationError(
                f"bitsandbytes has no codec {self.name!r}; it has {', '.join(sorted(_NUMPY))}"
            )

    def encode(self, values: Float32, *, rng: np.random.Generator | None = None) -> Encoded:
        """Round to nearest; ``rng`` is refused where the numpy codec would use it.

        Raises:
            QuantizationError: A value is not finite, or int8 with a generator.
        """
        array = finite(values)
        if array.size == 0:
            return _NUMPY[self.name].encode(array)
        if self.name != "int8":
            return _four_bits(array, self.name)
        if rng is not None:
            raise QuantizationError("bitsandbytes has no stochastic rounding; use the numpy codec")
        return _eight_bits(array)

    def decode(self, encoded: Encoded) -> Float32:
        """As the numpy codec of that name.

        Raises:
            QuantizationError: Parts missing, or their shapes or types do not follow from the shape.
        """
        return _NUMPY[self.name].decode(encoded)


def _four_bits(array: Float32, name: str) -> Encoded:
    codes, state = bitsandbytes.functional.quantize_4bit(
        _tensor(array.reshape(-1)), blocksize=BLOCK, quant_type=name
    )
    parts = {"codes": codes.numpy().reshape(-1), "absmax": state.absmax.numpy()}
    return Encoded(name, array.shape, parts)


def _eight_bits(array: Float32) -> Encoded:
    """Rows too small for bitsandbytes, which divides by their largest magnitude, go to numpy."""
    rows = array.reshape(rows_and_columns(array.shape))
    codes, statistic, _ = bitsandbytes.functional.int8_vectorwise_quant(_tensor(rows))
    parts = {"codes": codes.numpy(), "scale": np.divide(statistic.numpy(), 127, dtype=np.float32)}
    is_small = parts["scale"] <= TINY
    if is_small.any():
        small = _INT8.encode(rows[is_small])
        for role, part in parts.items():
            part[is_small] = small.parts[role]
    return Encoded("int8", array.shape, parts)


def _tensor(array: Float32) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())
