# SPDX-License-Identifier: Apache-2.0
"""Tensors survive the wire unchanged, and nothing malformed becomes one."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.proto.limits import MAX_TENSOR_NAME_BYTES, MAX_TENSOR_RANK
from lorikit.proto.tensors import (
    Bundle,
    Encoded,
    MalformedTensorError,
    WireHeader,
    pack,
    raw,
    unpack,
)
from lorikit.proto.v1 import tensor_pb2

DTYPES = ("float32", "float16", "int8", "uint8", "int32", "int64", "uint16", "uint32", "bool")

part_arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0))
)
tensors = st.builds(
    Encoded,
    codec=st.sampled_from(("fp32", "int8", "nf4")),
    shape=arrays.array_shapes(min_dims=0, min_side=0),
    parts=st.dictionaries(st.sampled_from(("codes", "absmax", "values")), part_arrays),
)
bundles = st.builds(
    Bundle,
    tensors=st.dictionaries(st.text("abé.", min_size=1, max_size=8), tensors, max_size=3),
    scalars=st.dictionaries(st.text(max_size=8), st.floats(), max_size=3),
    wire=st.none()
    | st.builds(
        WireHeader,
        version=st.integers(0, 2**32 - 1),
        scheme=st.text(max_size=8),
        delta=st.booleans(),
        stochastic=st.booleans(),
        rotation_block=st.integers(0, 2**32 - 1),
        seed=st.integers(0, 2**64 - 1),
        error_feedback=st.booleans(),
        round=st.integers(0, 2**32 - 1),
    ),
)


def message_with(**changes: object) -> tensor_pb2.TensorBundle:
    """A bundle of one good tensor "t", two float32 elements, whose only part is changed."""
    part = {"name": "values", "dtype": "float32", "shape": [2], "data": bytes(8), **changes}
    tensor = tensor_pb2.Tensor(
        name="t",
        codec="fp32",
        shape=[2],
        parts=[tensor_pb2.TensorPart(**part)],  # type: ignore[arg-type]  # wrong ones on purpose
    )
    return tensor_pb2.TensorBundle(format=1, tensors=[tensor])


@given(bundles)
def test_unpack_of_pack_gives_the_same_bundle(bundle: Bundle) -> None:
    again = unpack(pack(bundle))

    assert again.wire == bundle.wire
    assert again.scalars == pytest.approx(bundle.scalars, rel=0, abs=0, nan_ok=True)
    assert again.tensors.keys() == bundle.tensors.keys()
    for name, tensor in bundle.tensors.items():
        assert (again.tensors[name].codec, again.tensors[name].shape) == (
            tensor.codec,
            tensor.shape,
        )
        assert again.tensors[name].parts.keys() == tensor.parts.keys()
        for role, part in tensor.parts.items():
            received = again.tensors[name].parts[role]
            assert received.dtype == part.dtype
            np.testing.assert_array_equal(received, part)


def test_equal_bundles_give_equal_bytes_whatever_the_order() -> None:
    one, two = raw([1.0, 2.0]), raw([[3.0]])

    forwards = pack(Bundle({"a": one, "b": two}, {"x": 1.0, "y": 2.0}))
    backwards = pack(Bundle({"b": two, "a": one}, {"y": 2.0, "x": 1.0}))

    assert forwards == backwards


def test_elements_travel_little_endian_and_row_major() -> None:
    big_endian = np.array([[1, 2], [3, 4]], ">i4").T

    packed = pack(Bundle({"t": Encoded("x", (2, 2), {"codes": big_endian})}))

    part = tensor_pb2.TensorBundle.FromString(packed).tensors[0].parts[0]
    assert part.data == bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])


def test_unpacked_arrays_can_be_written_to() -> None:
    array = unpack(pack(Bundle({"t": raw([1.0, 2.0])}))).tensors["t"].parts["values"]

    array[0] = 5

    assert array.tolist() == [5.0, 2.0]


@pytest.mark.parametrize("shape", [(), (0,), (1, 2)])
def test_raw_keeps_the_shape_even_of_a_scalar(shape: tuple[int, ...]) -> None:
    encoded = raw(np.ones(shape))

    assert encoded.shape == shape
    assert encoded.parts["values"].shape == shape
    assert encoded.nbytes == 4 * math.prod(shape)


def test_pack_refuses_elements_without_a_wire_form() -> None:
    with pytest.raises(MalformedTensorError, match="t/values: element type complex64"):
        pack(Bundle({"t": Encoded("x", (1,), {"values": np.zeros(1, np.complex64)})}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float64"}, "t/values: unknown element type 'float64'"),
        ({"dtype": ""}, "unknown element type ''"),
        ({"dtype": "object"}, "unknown element type 'object'"),
        ({"data": bytes(7)}, "7 bytes do not hold shape"),
        ({"data": bytes(9)}, "9 bytes do not hold shape"),
        ({"shape": [3]}, "8 bytes do not hold shape"),
        ({"shape": [2**62, 2**62]}, "exceeds"),
        ({"shape": [0, 2**62], "data": b""}, "exceeds"),
        ({"shape": [-1, -2]}, "negative length"),
        ({"shape": [1] * (MAX_TENSOR_RANK + 1)}, "9 axes exceed 8"),
        ({"dtype": "bool", "data": b"\x00\x02"}, "neither 0 nor 1"),
    ],
)
def test_malformed_part_is_refused_by_name(changes: dict[str, object], reason: str) -> None:
    unpack(message_with().SerializeToString())

    with pytest.raises(MalformedTensorError, match=reason):
        unpack(message_with(**changes).SerializeToString())


def rename(message: tensor_pb2.TensorBundle, name: str) -> None:
    message.tensors[0].name = name


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: m.tensors.append(m.tensors[0]), "t: stands twice"),
        (lambda m: m.tensors[0].parts.append(m.tensors[0].parts[0]), "'values' stands twice"),
        (lambda m: rename(m, ""), "bad tensor name"),
        (lambda m: rename(m, "é" * (MAX_TENSOR_NAME_BYTES // 2 + 1)), "bad tensor name"),
        (lambda m: m.tensors[0].shape.append(-1), "t: negative length"),
        (lambda m: m.tensors[0].shape.append(2**50), "t: shape .* exceeds"),
        (lambda m: m.__setattr__("format", 2), "bundle format 2 is not 1"),
        (lambda m: m.ClearField("format"), "bundle format 0 is not 1"),
    ],
)
def test_malformed_bundle_is_refused(
    spoil: Callable[[tensor_pb2.TensorBundle], None], reason: str
) -> None:
    message = message_with()
    spoil(message)

    with pytest.raises(MalformedTensorError, match=reason):
        unpack(message.SerializeToString())


def test_newer_format_is_told_before_anything_else_is_looked_at() -> None:
    message = message_with(dtype="float8")
    message.format = 2

    with pytest.raises(MalformedTensorError, match="format 2"):
        unpack(message.SerializeToString())


def test_every_truncation_is_refused_or_keeps_whole_tensors_only() -> None:
    packed = pack(Bundle({"a": raw([1.0, 2.0]), "b": raw(np.eye(3))}, {"examples": 7.0}))

    for length in range(len(packed)):
        try:
            bundle = unpack(packed[:length])
        except MalformedTensorError:
            continue
        for tensor in bundle.tensors.values():
            assert tensor.parts["values"].size == math.prod(tensor.shape)


def test_bundle_above_the_limit_is_refused_unread() -> None:
    packed = pack(Bundle({"t": raw(np.zeros(100))}))

    assert unpack(packed, max_bytes=len(packed)).tensors.keys() == {"t"}
    with pytest.raises(MalformedTensorError, match="exceeds the limit of 100"):
        unpack(packed, max_bytes=100)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_bundle_or_malformed(data: bytes) -> None:
    try:
        unpack(data)
    except MalformedTensorError:
        return
    assert tensor_pb2.TensorBundle.FromString(data).format == 1


hostile_parts = st.builds(
    tensor_pb2.TensorPart,
    name=st.text(max_size=2),
    dtype=st.sampled_from((*DTYPES, "", "float64", "<f4", "object", "str", "void")),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=9),
    data=st.binary(max_size=12),
)
hostile_bundles = st.builds(
    tensor_pb2.TensorBundle,
    format=st.sampled_from((0, 1, 1, 1, 2)),
    tensors=st.lists(
        st.builds(
            tensor_pb2.Tensor,
            name=st.text(max_size=2),
            codec=st.text(max_size=2),
            shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=9),
            parts=st.lists(hostile_parts, max_size=2),
        ),
        max_size=2,
    ),
)


@given(hostile_bundles)
def test_any_message_is_a_bundle_or_malformed(message: tensor_pb2.TensorBundle) -> None:
    try:
        bundle = unpack(message.SerializeToString())
    except MalformedTensorError:
        return
    assert len(bundle.tensors) == len(message.tensors)
