# SPDX-License-Identifier: Apache-2.0
"""A look at the framing of a serialised bundle before it is parsed.

A parsed message takes far more memory than its bytes: an empty tensor is two bytes on the wire and
some hundred in memory. So the fields are counted first, without making any of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorikit.proto.limits import (
    MAX_BUNDLE_SCALARS,
    MAX_BUNDLE_TENSORS,
    MAX_TENSOR_PARTS,
    MAX_TENSOR_RANK,
)

_TENSORS, _SCALARS = 2, 3
_SHAPE, _PARTS = 3, 4
_OTHERS = 32
"""Fields that a message may have beside the ones that are counted."""
_MAX_VARINT = 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class FramingError(ValueError):
    """The bytes are not framed as a bundle, or have more fields than a bundle may have."""


def check_framing(data: bytes) -> None:
    """Nothing, when the bytes can be parsed into a bundle within its limits of counts.

    Raises:
        FramingError: Cut off, a field of an unknown kind, or too many fields.
    """
    limits = {_TENSORS: MAX_BUNDLE_TENSORS, _SCALARS: MAX_BUNDLE_SCALARS}
    for number, tensor in _counted(memoryview(data), limits, "bundle"):
        if number != _TENSORS or tensor is None:
            continue
        inner = {_SHAPE: MAX_TENSOR_RANK, _PARTS: MAX_TENSOR_PARTS}
        for inside, part in _counted(tensor, inner, "tensor"):
            if inside == _PARTS and part is not None:
                for _ in _counted(part, {_SHAPE: MAX_TENSOR_RANK}, "part of a tensor"):
                    pass


def _counted(
    data: memoryview, limits: dict[int, int], what: str
) -> Iterator[tuple[int, memoryview | None]]:
    """Fields of a message with their bytes, where they have some; as many as the limits allow."""
    counts = dict.fromkeys(limits, 0)
    others = 0
    for number, content in _fields(data):
        if number not in counts:
            others += 1
            if others > _OTHERS:
                raise FramingError(f"a {what} has more than {_OTHERS} unknown fields")
        else:
            counts[number] += 1
            if counts[number] > limits[number]:
                raise FramingError(f"a {what} has more than {limits[number]} of field {number}")
            if number == _SHAPE and content is not None and what != "bundle":
                _check_shape_bytes(content, limits[number], what)
        yield number, content


def _check_shape_bytes(content: memoryview, most: int, what: str) -> None:
    if len(content) > most * _MAX_VARINT:
        raise FramingError(f"a {what} has a shape of {len(content)} bytes, {most} axes allowed")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
            yield key >> 3, None
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _BYTES:
            length, position = _varint(data, position)
        if length is None or length > len(data) - position:
            raise FramingError("a field is cut off, or of a kind that is not used")
        yield key >> 3, data[position : position + length] if kind == _BYTES else None
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for place in range(_MAX_VARINT):
        if position + place >= len(data):
            break
        byte = data[position + place]
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, position + place + 1
    raise FramingError("a number is cut off")
