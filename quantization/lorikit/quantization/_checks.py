# SPDX-License-Identifier: Apache-2.0
"""Checks that every codec makes: values are finite, parts follow from the shape."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded
from lorikit.quantization.base import Float32, QuantizationError

Scalar = TypeVar("Scalar", bound=np.generic)

_MAX_LENGTH = 1 << 40
"""Longest axis decoded; keeps absurd axes beside an empty one away from numpy."""


def finite(values: npt.ArrayLike) -> Float32:
    """The values as a contiguous float32 array of the same shape.

    Raises:
        QuantizationError: A value is not finite; the message gives the first index and value.
    """
    with np.errstate(over="ignore"):
        array = np.asarray(values, dtype=np.float32, order="C")
    if array.size and not (math.isfinite(array.min()) and math.isfinite(array.max())):
        refuse_first(array, ~np.isfinite(array), "is not finite")
    return array


def refuse_first(values: Float32, is_bad: npt.NDArray[np.bool_], why: str) -> None:
    """Raise an error that names the first bad value and its index; nothing if there is none."""
    if not is_bad.any():
        return
    index = np.unravel_index(int(is_bad.argmax()), values.shape)
    where = ", ".join(str(int(axis)) for axis in index)
    count = int(np.count_nonzero(is_bad))
    raise QuantizationError(
        f"value {values[index]} at [{where}] of shape {values.shape} {why} "
        f"({count} such of {values.size})"
    )


def check(encoded: Encoded, codec: str, *roles: str) -> None:
    """Refuse a tensor of another codec, or whose parts are not exactly those roles.

    Raises:
        QuantizationError: Wrong codec, a part missing or too many, or an axis out of range.
    """
    if encoded.codec != codec:
        raise QuantizationError(f"codec {codec!r} cannot decode a tensor of {encoded.codec!r}")
    if set(encoded.parts) != set(roles):
        raise QuantizationError(
            f"{codec}: parts are {sorted(encoded.parts)!r:.200}, expected {sorted(roles)}"
        )
    if any(not 0 <= length <= _MAX_LENGTH for length in encoded.shape):
        raise QuantizationError(f"{codec}: no tensor has the shape {encoded.shape!r:.200}")


def part(
    encoded: Encoded, role: str, dtype: type[Scalar], shape: tuple[int, ...]
) -> npt.NDArray[Scalar]:
    """One part of a tensor, which must have exactly this element type and shape.

    Raises:
        QuantizationError: Another element type or shape.
    """
    array = encoded.parts[role]
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise QuantizationError(
            f"{encoded.codec}: part {role!r} is {array.dtype} {array.shape}, but the shape "
            f"{encoded.shape} needs {np.dtype(dtype)} {shape}"
        )
    return array.view(dtype)


def size(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    return math.prod(shape)


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape as a matrix whose columns are the last axis; a scalar is 1 x 1."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1
