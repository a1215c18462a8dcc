# SPDX-License-Identifier: Apache-2.0
"""What an operator is: a function of a node's attributes and input tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Nibbles:
    """A constant of ONNX's four-bit types as it is stored: two elements a byte, low nibble first.

    It stays packed until an operator reads it.
    """

    codes: Tensor
    """uint8 [(elements + 1) // 2]."""
    shape: tuple[int, ...]
    signed: bool

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def to(self, device: torch.device) -> Nibbles:
        """The same on another device."""
        return Nibbles(self.codes.to(device), self.shape, self.signed)

    def unpacked(self) -> Tensor:
        """The elements, int8."""
        pairs = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).reshape(-1)
        values = pairs[: torch.Size(self.shape).numel()].reshape(self.shape).to(torch.int8)
        return torch.where(values > 7, values - 16, values) if self.signed else values


Value = Tensor | Nibbles
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Value
Attributes = Mapping[str, Attribute]
Result = Tensor | tuple[Tensor | None, ...]
Operator = Callable[..., Result]
"""Called with the attributes and then the inputs; an input that is left out is None."""

TYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
}
"""Element types by ONNX's number."""

UINT4, INT4 = 21, 22
"""ONNX's numbers of the four-bit types."""


HOST_ELEMENTS = 64
"""Whole numbers of at most so many elements may stay on the host: they are shapes and axes."""


def is_data(value: Value) -> bool:
    """Whether a value belongs on the device that computes, because it is no shape or axis."""
    return isinstance(value, Nibbles) or value.is_floating_point() or value.numel() > HOST_ELEMENTS


def whole(attributes: Attributes, name: str, default: int) -> int:
    """An attribute that is a whole number."""
    value = attributes.get(name, default)
    assert isinstance(value, int), f"{name} is {value!r}"
    return value


def real(attributes: Attributes, name: str, default: float) -> float:
    """An attribute that is a real number."""
    value = attributes.get(name, default)
    assert isinstance(value, int | float), f"{name} is {value!r}"
    return float(value)


def text(attributes: Attributes, name: str, default: str) -> str:
    """An attribute that is a text."""
    value = attributes.get(name, default)
    assert isinstance(value, str), f"{name} is {value!r}"
    return value


def wholes(attributes: Attributes, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """An attribute that is a list of whole numbers."""
    value = attributes.get(name, default)
    assert isinstance(value, tuple), f"{name} is {value!r}"
    return tuple(int(item) for item in value)


def numbers(values: Tensor) -> list[int]:
    """The elements of a tensor that says how to compute: a shape, axes, positions."""
    return [int(value) for value in values.reshape(-1).tolist()]
