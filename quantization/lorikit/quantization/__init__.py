# SPDX-License-Identifier: Apache-2.0
"""Codecs: fewer bits, on the wire and in the base model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from lorikit.proto.tensors import Encoded
from lorikit.quantization.base import Codec, QuantizationError
from lorikit.quantization.fp16 import Fp16
from lorikit.quantization.fp32 import Fp32
from lorikit.quantization.int8 import Int8
from lorikit.quantization.nf4 import NF4

__all__ = [
    "CODECS",
    "Codec",
    "QuantizationError",
    "codec",
    "convert",
]

_ALL: tuple[Codec, ...] = (Fp32(), Fp16(), Int8(), NF4)

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
