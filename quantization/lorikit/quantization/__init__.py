# SPDX-License-Identifier: Apache-2.0
"""Codecs: fewer bits, on the wire and in the base model.

``codec(name)`` finds a codec, ``convert`` goes from one to another, ``error_metrics`` says what it
cost. Base weights: ``nf4``, ``fp4`` (each also ``-dq``), ``int8``, ``int8-row32/64/128``,
``int4-row32/64/128``, ``fp16``, ``bf16``, ``fp32``. Updates: ``int1``, ``int2``, ``int3``,
``int4``, ``int6``, ``int8-block64``, ``topk``, ``fp16``, ``bf16``, ``fp32``; ``wire`` sends changes
with rotation and seeded rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from lorikit.proto.tensors import Encoded
from lorikit.quantization.base import Codec, QuantizationError
from lorikit.quantization.bf16 import Bf16
from lorikit.quantization.fp4 import FP4, FP4_DQ
from lorikit.quantization.fp16 import Fp16
from lorikit.quantization.fp32 import Fp32
from lorikit.quantization.int4 import Int4, Int4Rows
from lorikit.quantization.int8 import Int8, Int8Blocks, Int8Rows
from lorikit.quantization.metrics import ErrorMetrics, error_metrics
from lorikit.quantization.nf4 import NF4, NF4_DQ
from lorikit.quantization.planes import INT1, INT2, INT3, INT6
from lorikit.quantization.topk import TopK

__all__ = [
    "CODECS",
    "Codec",
    "ErrorMetrics",
    "QuantizationError",
    "codec",
    "convert",
    "error_metrics",
]

_ALL: tuple[Codec, ...] = (
    Fp32(),
    Fp16(),
    Bf16(),
    Int8(),
    Int8Rows(32),
    Int8Rows(64),
    Int8Rows(128),
    Int8Blocks(),
    INT6,
    Int4(),
    INT3,
    INT2,
    INT1,
    TopK(1 / 64),
    Int4Rows(32),
    Int4Rows(64),
    Int4Rows(128),
    FP4,
    FP4_DQ,
    NF4,
    NF4_DQ,
)

CODECS: Mapping[str, Codec] = MappingProxyType({each.name: each for each in _ALL})
"""Every codec by name."""


def codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        QuantizationError: Unknown name; the message lists the known ones.
    """
    if name not in CODECS:
        raise QuantizationError(f"unknown codec {name!r:.80}; known are {', '.join(CODECS)}")
    return CODECS[name]


def convert(encoded: Encoded, to_name: str, *, rng: np.random.Generator | None = None) -> Encoded:
    """The same tensor in another codec; unchanged where it is in that codec already.

    Args:
        encoded: What to convert.
        to_name: Codec of the result.
        rng: Source of stochastic rounding, where the codec has it; None rounds to nearest.

    Raises:
        QuantizationError: Unknown codec, malformed parts, or values the codec cannot hold.
    """
    target = codec(to_name)
    source = codec(encoded.codec)
    return encoded if target is source else target.encode(source.decode(encoded), rng=rng)
