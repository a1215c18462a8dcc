# SPDX-License-Identifier: Apache-2.0
"""Named, encoded tensors and their wire form.

Nothing here trusts the bytes: format, names, element types, shapes and lengths are checked before
an array is made, and an array never outlives the bytes it came from by surprise (it is a copy).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from lorikit.proto.framing import FramingError, check_framing
from lorikit.proto.limits import (
    MAX_BUNDLE_BYTES,
    MAX_BUNDLE_TENSORS,
    MAX_TENSOR_NAME_BYTES,
    MAX_TENSOR_RANK,
)
from lorikit.proto.v1 import tensor_pb2

BUNDLE_FORMAT = 1
"""Format of a bundle that this version writes and reads."""

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
Tensors = dict[str, Float32]
"""Decoded tensors by name, float32."""

_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "float32", "float16", "int8", "uint8", "int32", "int64", "uint16", "uint32", "bool",
    )
}  # fmt: skip

_MAX_ELEMENTS = 1 << 40
"""Most elements of a shape, counting empty axes as one: what any platform can address."""


class MalformedTensorError(ValueError):
    """The bytes are not a bundle of tensors, or break one of its rules."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor as a codec left it."""

    codec: str
    """Name of the codec that can decode it."""

    shape: tuple[int, ...]
    """Shape after decoding."""

    parts: Mapping[str, Array]
    """The codec's arrays by role, for example ``{"codes": ..., "absmax": ...}``."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together, without names and framing."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class WireHeader:
    """How the adapter tensors of an update were put on the wire, beside their codecs."""

    version: int
    """Version of the scheme's meaning; the reader checks it."""
    scheme: str
    """A codec, or ``adaptive`` where each tensor has its own."""
    delta: bool
    """Whether the tensors are changes against the adapter as received."""
    stochastic: bool
    """Whether the rounding was stochastic; else to nearest."""
    rotation_block: int
    """Length of the rotation's blocks; 0 where nothing was rotated."""
    seed: int
    """Seed of rounding and rotation, joined by each tensor's name."""
    error_feedback: bool
    """Whether what earlier updates left out was added before encoding."""
    round: int
    """Round whose adapter the changes are against."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A set of named tensors and the numbers that belong to it."""

    tensors: Mapping[str, Encoded] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    wire: WireHeader | None = None
    """Of an update whose tensors travel as more than plain values."""


def raw(values: npt.ArrayLike) -> Encoded:
    """Wrap values as the codec ``fp32``: float32 elements, nothing lost, nothing saved."""
    array = np.asarray(values, dtype=np.float32, order="C")
    return Encoded("fp32", array.shape, {"values": array})


def pack(bundle: Bundle) -> bytes:
    """Serialise a bundle; equal bundles give equal bytes (tensors and scalars sorted by name)."""
    message = tensor_pb2.TensorBundle(format=BUNDLE_FORMAT)
    for name in sorted(bundle.tensors):
        encoded = bundle.tensors[name]
        tensor = message.tensors.add(name=name, codec=encoded.codec, shape=encoded.shape)
        for role in sorted(encoded.parts):
            part = encoded.parts[role]
            dtype = _DTYPES.get(part.dtype.name)
            if dtype is None:
                raise MalformedTensorError(
                    f"{name}/{role}: element type {part.dtype} has no wire form"
                )
            data = np.ascontiguousarray(part, dtype=dtype).tobytes()
            tensor.parts.add(name=role, dtype=part.dtype.name, shape=part.shape, data=data)
    for name in sorted(bundle.scalars):
        message.scalars[name] = bundle.scalars[name]
    if bundle.wire is not None:
        message.wire.CopyFrom(tensor_pb2.WireHeader(**dataclasses.asdict(bundle.wire)))
    return message.SerializeToString(deterministic=True)


def unpack(data: bytes, *, max_bytes: int = MAX_BUNDLE_BYTES) -> Bundle:
    """Parse and check a serialised bundle.

    Args:
        data: Bytes from ``pack``.
        max_bytes: Largest input accepted.

    Raises:
        MalformedTensorError: Too large, too many fields (counted before anything is made of them),
            not a bundle, newer format, duplicate name, unknown element type, or a part whose length
            does not follow from its shape; the message names the tensor.
    """
    if len(data) > max_bytes:
        raise MalformedTensorError(f"bundle of {len(data)} bytes exceeds the limit of {max_bytes}")
    message = tensor_pb2.TensorBundle()
    try:
        check_framing(data)
        message.ParseFromString(data)
    except (DecodeError, FramingError) as error:
        raise MalformedTensorError(f"bytes are not a tensor bundle: {error}") from error
    if message.format != BUNDLE_FORMAT:
        raise MalformedTensorError(f"bundle format {message.format} is not {BUNDLE_FORMAT}")
    if len(message.tensors) > MAX_BUNDLE_TENSORS:
        raise MalformedTensorError(f"{len(message.tensors)} tensors exceed {MAX_BUNDLE_TENSORS}")
    tensors: dict[str, Encoded] = {}
    for tensor in message.tensors:
        if not tensor.name or len(tensor.name.encode()) > MAX_TENSOR_NAME_BYTES:
            raise MalformedTensorError(f"bad tensor name {tensor.name[:80]!r}")
        if tensor.name in tensors:
            raise MalformedTensorError(f"{tensor.name}: stands twice in the bundle")
        parts: dict[str, Array] = {}
        for part in tensor.parts:
            if part.name in parts:
                raise MalformedTensorError(f"{tensor.name}: part {part.name!r} stands twice")
            parts[part.name] = _array(f"{tensor.name}/{part.name}", part)
        tensors[tensor.name] = Encoded(
            tensor.codec, checked_shape(tensor.name, tensor.shape), parts
        )
    return Bundle(tensors, dict(message.scalars), _header(message))


def _header(message: tensor_pb2.TensorBundle) -> WireHeader | None:
    if not message.HasField("wire"):
        return None
    return WireHeader(**{f.name: getattr(message.wire, f.name) for f in fields(WireHeader)})


def checked_shape(name: str, shape: object) -> tuple[int, ...]:
    """A shape from outside as a tuple of lengths, or an error that names the tensor."""
    lengths = tuple(int(length) for length in shape)  # type: ignore[attr-defined]  # any iterable
    if len(lengths) > MAX_TENSOR_RANK:
        raise MalformedTensorError(f"{name}: {len(lengths)} axes exceed {MAX_TENSOR_RANK}")
    if any(length < 0 for length in lengths):
        raise MalformedTensorError(f"{name}: negative length in shape {lengths}")
    if math.prod(max(length, 1) for length in lengths) > _MAX_ELEMENTS:
        raise MalformedTensorError(f"{name}: shape {lengths} exceeds {_MAX_ELEMENTS} elements")
    return lengths


def _array(name: str, part: tensor_pb2.TensorPart) -> Array:
    dtype = _DTYPES.get(part.dtype)
    if dtype is None:
        raise MalformedTensorError(f"{name}: unknown element type {part.dtype!r}")
    shape = checked_shape(name, part.shape)
    if math.prod(shape) * dtype.itemsize != len(part.data):
        raise MalformedTensorError(
            f"{name}: {len(part.data)} bytes do not hold shape {shape} of {part.dtype}"
        )
    if part.dtype == "bool" and part.data.translate(None, b"\x00\x01"):
        raise MalformedTensorError(f"{name}: a bool is neither 0 nor 1")
    values = np.frombuffer(part.data, dtype=dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="))
