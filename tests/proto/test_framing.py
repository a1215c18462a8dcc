# SPDX-License-Identifier: Apache-2.0
"""The fields of a bundle are counted before any of them is made."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.proto.framing import FramingError, check_framing
from lorikit.proto.limits import MAX_BUNDLE_SCALARS, MAX_BUNDLE_TENSORS
from lorikit.proto.tensors import (
    Bundle,
    MalformedTensorError,
    WireHeader,
    pack,
    raw,
    unpack,
)
from lorikit.proto.v1 import tensor_pb2

EMPTY_TENSOR = bytes([0x12, 0])


def packed(fields: dict[str, object]) -> bytes:
    return tensor_pb2.TensorBundle(**fields).SerializeToString()


@given(
    st.dictionaries(st.text(min_size=1, max_size=20), st.integers(0, 7), max_size=8),
    st.dictionaries(st.text(max_size=20), st.floats(), max_size=8),
)
def test_every_bundle_that_is_packed_passes(lengths, scalars):
    tensors = {name: raw(np.zeros((length, 2), np.float32)) for name, length in lengths.items()}
    header = WireHeader(
        version=1,
        scheme="fp32",
        delta=False,
        stochastic=False,
        rotation_block=0,
        seed=(1 << 64) - 1,
        error_feedback=False,
        round=3,
    )

    check_framing(pack(Bundle(tensors, scalars, header)))


@given(st.binary(max_size=200))
def test_bytes_pass_or_are_refused_by_name(data):
    try:
        check_framing(data)
    except FramingError:
        with pytest.raises(MalformedTensorError):
            unpack(data)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_change_of_a_real_bundle_is_no_crash(noise, place):
    data = bytearray(pack(Bundle({"a": raw(np.ones((3, 4), np.float32))}, {"rank": 4.0})))
    place %= len(data)
    data[place : place + len(noise)] = noise
    with contextlib.suppress(MalformedTensorError):
        unpack(bytes(data))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (EMPTY_TENSOR * (MAX_BUNDLE_TENSORS + 1), "more than 100000 of field 2"),
        (bytes([0x1A, 0]) * (MAX_BUNDLE_SCALARS + 1), "more than 10000 of field 3"),
        (bytes([0x3A, 0]) * 1000, "unknown fields"),
        (packed({"tensors": [{"parts": [{}] * 17}]}), "more than 16 of field 4"),
        (packed({"tensors": [{"shape": [1] * 1000}]}), "shape of 1000 bytes"),
        (packed({"tensors": [{"parts": [{"shape": [1] * 1000}]}]}), "shape of 1000 bytes"),
        (b"\x12\x05abc", "cut off"),
        (b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "cut off"),
        (b"\x13", "not used"),
        (b"\x80" * 11, "a number is cut off"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_too_many_or_broken_fields_are_refused(data, sentence):
    with pytest.raises(FramingError, match=sentence):
        check_framing(data)
    with pytest.raises(MalformedTensorError, match="not a tensor bundle"):
        unpack(data)


def test_no_message_is_made_of_what_is_refused(monkeypatch):
    """Ten million empty tensors are 20 MB on the wire and a gigabyte as messages."""

    class Unparsed:
        def ParseFromString(self, data):  # noqa: N802  # protobuf's name
            raise AssertionError("parsed before it was counted")

    monkeypatch.setattr("lorikit.proto.tensors.tensor_pb2.TensorBundle", Unparsed)

    with pytest.raises(MalformedTensorError):
        unpack(EMPTY_TENSOR * 10_000_000)
