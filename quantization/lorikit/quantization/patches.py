# SPDX-License-Identifier: Apache-2.0
"""From one blob of weights to another by a small patch.

A patch is the length of its head (8 bytes, little endian), the head, and data. The head is JSON:
the target's size and steps in the order of the target, each ``[operation, to, from, data, length]``
with offsets in bytes into target, base blob and the patch's data:

    copy   length bytes of the base as they are
    data   length bytes of the data as they are
    join   8-bit codes from ``length`` bytes of high nibbles, and as many of low ones of the data
    cut    ``length`` bytes of packed high nibbles from 8-bit codes of the base
    down   float32 scales of the base, ``length`` bytes, over 16
    up     the same times 16

What lies between steps is zero. Whoever applies a patch compares the digest of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from lorikit.quantization.base import QuantizationError
from lorikit.quantization.nested import RATIO, cut, refined

_PIECE = 1 << 20
_LARGEST_HEAD = 16 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """Some bytes of the target."""

    operation: str
    to: int
    start: int = 0
    """Offset in the base."""
    data: bytes = b""
    """What the patch brings along."""
    length: int = 0

    @property
    def produced(self) -> int:
        """Bytes of the target that it makes."""
        return 2 * self.length if self.operation == "join" else self.length


def packed_patch(steps: Sequence[Step], size: int) -> bytes:
    """A patch that makes a blob of that size.

    Args:
        steps: By place in the target, without overlap.
        size: Of the target in bytes.
    """
    rows, data = [], bytearray()
    for step in sorted(steps, key=lambda each: each.to):
        rows.append([step.operation, step.to, step.start, len(data), step.length])
        data.extend(step.data)
    head = json.dumps({"size": size, "steps": rows}, separators=(",", ":")).encode()
    return len(head).to_bytes(8, "little") + head + bytes(data)


def patched(patch: BinaryIO, base: BinaryIO) -> Iterator[bytes]:
    """The target, piece by piece, at most about 2 MiB at a time.

    Raises:
        QuantizationError: Not a patch, or one that does not fit the base.
    """
    length = int.from_bytes(_exactly(patch, 8), "little")
    if length > _LARGEST_HEAD:
        raise QuantizationError(f"head of a patch of {length} bytes exceeds {_LARGEST_HEAD}")
    try:
        head = json.loads(_exactly(patch, length))
        size, rows = int(head["size"]), [_row(row) for row in head["steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise QuantizationError(f"bytes are not a patch of weights: {error!r:.200}") from error
    place = 0
    for operation, to, start, offset, count in rows:
        if to < place:
            raise QuantizationError(f"step at {to} lies before byte {place} of the target")
        yield from _zeros(to - place)
        place = to
        for done in range(0, count, _PIECE):
            part = min(_PIECE, count - done)
            made = _OPERATIONS[operation](base, start, patch, 8 + length + offset, done, part)
            place += len(made)
            yield made
    if place > size:
        raise QuantizationError(f"steps make {place} bytes of a target of {size}")
    yield from _zeros(size - place)


def _row(row: Sequence[object]) -> tuple[str, int, int, int, int]:
    operation, *numbers = row
    if operation not in _OPERATIONS:
        raise ValueError(f"operation {operation!r:.40} is unknown; update the SDK")
    to, start, offset, length = (int(number) for number in numbers)  # type: ignore[call-overload]  # refused below
    if min(to, start, offset, length) < 0:
        raise ValueError(f"negative number in {row!r:.80}")
    return str(operation), to, start, offset, length


def _copy(base: BinaryIO, start: int, patch: BinaryIO, data: int, done: int, part: int) -> bytes:
    return _at(base, start + done, part)


def _data(base: BinaryIO, start: int, patch: BinaryIO, data: int, done: int, part: int) -> bytes:
    return _at(patch, data + done, part)


def _join(base: BinaryIO, start: int, patch: BinaryIO, data: int, done: int, part: int) -> bytes:
    high = np.frombuffer(_at(base, start + done, part), np.uint8)
    return refined(high, np.frombuffer(_at(patch, data + done, part), np.uint8)).tobytes()


def _cut(base: BinaryIO, start: int, patch: BinaryIO, data: int, done: int, part: int) -> bytes:
    return cut(np.frombuffer(_at(base, start + 2 * done, 2 * part), np.uint8)).tobytes()


def _down(base: BinaryIO, start: int, patch: BinaryIO, data: int, done: int, part: int) -> bytes:
    return (np.frombuffer(_at(base, start + done, part), "<f4") / RATIO).tobytes()


def _up(base: BinaryIO, start: int, patch: BinaryIO, data: int, done: int, part: int) -> bytes:
    return (np.frombuffer(_at(base, start + done, part), "<f4") * RATIO).tobytes()


_Operation = Callable[[BinaryIO, int, BinaryIO, int, int, int], bytes]

_OPERATIONS: dict[str, _Operation] = {
    "copy": _copy, "data": _data, "join": _join, "cut": _cut, "down": _down, "up": _up,
}  # fmt: skip


def _at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return _exactly(file, length)


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise QuantizationError(f"a patch or its base ends {length - len(data)} bytes early")
    return data


def _zeros(length: int) -> Iterator[bytes]:
    for done in range(0, length, _PIECE):
        yield bytes(min(_PIECE, length - done))
