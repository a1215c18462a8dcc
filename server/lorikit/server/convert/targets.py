# SPDX-License-Identifier: Apache-2.0
"""Which codec a tensor gets, and how it is encoded piece by piece."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorikit.proto.tensors import Array, Encoded, Float32
from lorikit.quantization import codec
from lorikit.quantization._double import DoubleTableCodec
from lorikit.server.convert.safetensors import Stored

TARGETS = (
    "nf4", "nf4-dq", "fp4", "fp4-dq", "int4-row32", "int4-row64", "int4-row128",
    "int8-row32", "int8-row64", "int8-row128", "int8", "fp16", "bf16", "fp32",
)  # fmt: skip
"""Codecs a folder can be converted to."""

AS_IT_IS = ""
"""Codec of a tensor that is copied byte for byte."""

_BLOCK = 64
"""Values of the flattened tensor that share a magnitude; pieces hold whole blocks."""

_TABLES = re.compile(r"embed|(^|\.)w[tp]e\.|relative_attention_bias")
_WIDE = ("fp16", "bf16", "fp32", "int8", "int8-row32", "int8-row64", "int8-row128")


def class_of(tensor: Stored) -> str:
    """``matrix``, ``table`` (read row by row: embeddings), ``vector`` or ``other`` (no reals)."""
    if not tensor.is_float:
        return "other"
    if len(tensor.shape) < 2:
        return "vector"
    return "table" if _TABLES.search(tensor.name) else "matrix"


def codec_for(tensor: Stored, target: str) -> str:
    """Codec of one tensor in a folder of that target.

    Matrices get the target's. Tables take at least 8 bits, since a row is read as it is. Vectors
    and what is not real are copied: they are small, and quality hangs on them.
    """
    kind = class_of(tensor)
    if kind == "matrix":
        return target
    if kind == "table":
        return target if target in _WIDE else "int8"
    return AS_IT_IS


@dataclass(slots=True)
class Errors:
    """Sums over the pieces of a tensor."""

    signal: float = 0.0
    """Sum of squares."""
    noise: float = 0.0
    """Sum of squared errors."""
    largest: float = 0.0
    """Largest magnitude of an error."""

    def add(self, other: Errors) -> None:
        """Count another piece or tensor."""
        self.signal += other.signal
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)


def encode_piece(values: Float32, name: str) -> tuple[Encoded, Errors]:
    """A piece [rows, columns] in the codec, and what that costs.

    Raises:
        QuantizationError: A value is not finite or out of the codec's range.
    """
    chosen = codec(_simple(name))
    encoded = chosen.encode(values)
    error = (chosen.decode(encoded) - values).reshape(-1)
    flat = values.reshape(-1)
    return encoded, Errors(
        signal=_squares(flat),
        noise=_squares(error),
        largest=float(max(error.max(initial=0), -error.min(initial=0))),
    )


def joined(pieces: Sequence[Encoded], name: str, shape: tuple[int, ...]) -> Encoded:
    """The tensor whose pieces these are, in order.

    All codecs but the double-quantised ones are made of parts that run along the rows; those need
    every block's magnitude before the first can be quantised.
    """
    roles = pieces[0].parts
    parts = {role: _concatenated([piece.parts[role] for piece in pieces]) for role in roles}
    chosen = codec(name)
    if isinstance(chosen, DoubleTableCodec):
        return chosen.with_magnitudes(shape, parts["codes"], parts["absmax"])  # type: ignore[arg-type]  # a table codec's parts
    return Encoded(name, shape, {r: _shaped(p, name, shape) for r, p in parts.items()})


def piece_rows(shape: tuple[int, ...], values: int) -> int:
    """Rows of a piece of about so many values that cuts no block of any codec."""
    columns = max(shape[-1] if shape else 1, 1)
    unit = _BLOCK // math.gcd(columns, _BLOCK)
    return max(1, values // (unit * columns)) * unit


def _simple(name: str) -> str:
    return name.removesuffix("-dq")


def _squares(values: Float32) -> float:
    return float(np.dot(values, values))


def _concatenated(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _shaped(part: Array, name: str, shape: tuple[int, ...]) -> Array:
    """Codecs whose only part has the tensor's shape get it back."""
    plain = name in ("fp32", "fp16", "bf16") and part.size == math.prod(shape)
    return part.reshape(shape) if plain else part
