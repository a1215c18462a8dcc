# SPDX-License-Identifier: Apache-2.0
"""What travels is what the header says, byte for byte, and nothing else is read."""

from __future__ import annotations

import dataclasses
import tracemalloc
import zlib

import numpy as np
import pytest

from lorikit.proto.tensors import Bundle, Encoded, MalformedTensorError, WireHeader, pack, unpack
from lorikit.quantization import QuantizationError, error_metrics, wire
from lorikit.quantization.base import Float32

HEADER = WireHeader(
    version=1,
    scheme="int4",
    delta=True,
    stochastic=True,
    rotation_block=0,
    seed=7,
    error_feedback=False,
    round=3,
)
MATRICES = [name for name in wire.SCHEMES if name != "adaptive"]
SHAPES = [(8, 384), (384, 8), (150, 384), (33, 17), (9, 7, 11)]


def header(**changes: object) -> WireHeader:
    return dataclasses.replace(HEADER, **changes)  # type: ignore[arg-type]  # of any kind


def normal(shape: tuple[int, ...], seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def encoded_as(values: Float32, name: str, head: WireHeader) -> Encoded:
    return wire.encode(values, name, head, wire.scheme_codec(head.scheme, top_share=1 / 64))


@pytest.mark.parametrize("scheme", MATRICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [0, 1024])
def test_every_scheme_comes_back_through_the_wire(
    scheme: str, shape: tuple[int, ...], block: int
) -> None:
    head = header(scheme=scheme, rotation_block=block, stochastic=False)
    values = normal(shape)
    sent = Bundle({"w": encoded_as(values, "w", head)}, wire=head)

    received = unpack(pack(sent))
    assert received.wire == head
    decoded = wire.decode(received.tensors["w"], "w", received.wire)

    least = {"fp32": 1e9, "fp16": 60, "bf16": 45, "int8-block64": 40, "int6": 28, "int4": 17}
    least |= {"int3": 12, "int2": 8, "int1": 3.8, "topk": 0.3}
    assert decoded.shape == shape
    assert error_metrics(values, decoded).sqnr_db >= least[scheme]


def expected_bytes(scheme: str, count: int) -> int:
    """Codes and scales of so many values, as the page about quantisation says."""
    blocks = -(-count // 64)
    return {
        "fp32": 4 * count,
        "fp16": 2 * count,
        "bf16": 2 * count,
        "int8-block64": count + 2 * blocks,
        "int6": 6 * -(-count // 8) + 2 * blocks,
        "int4": -(-count // 2) + 2 * blocks,
        "int3": 3 * -(-count // 8) + 2 * blocks,
        "int2": 2 * -(-count // 8) + 2 * blocks,
        "int1": -(-count // 8) + 2 * -(-count // 128),
    }[scheme]


@pytest.mark.parametrize("scheme", [name for name in MATRICES if name != "topk"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [0, 64])
def test_bytes_follow_from_the_shape_alone(scheme: str, shape: tuple[int, ...], block: int) -> None:
    head = header(scheme=scheme, rotation_block=block)
    assert encoded_as(normal(shape), "w", head).nbytes == expected_bytes(
        scheme, int(np.prod(shape))
    )


@pytest.mark.parametrize("scheme", ["int8-block64", "int6", "int4", "int3", "int2", "int1"])
@pytest.mark.parametrize("block", [0, 256])
def test_stochastic_rounding_is_unbiased_rotated_or_not(scheme: str, block: int) -> None:
    values = normal((24, 50))
    draws = [
        wire.decode(encoded_as(values, "w", head), "w", head)
        for head in (header(scheme=scheme, rotation_block=block, seed=seed) for seed in range(800))
    ]
    errors = np.array(draws, np.float64) - values
    # the mean of 800 draws of 1200 values, within 5 standard errors of the one that varies most
    allowed = 5 * errors.std(axis=0).max() / np.sqrt(len(draws))
    assert np.abs(errors.mean(axis=0)).max() <= allowed
    nearest = dataclasses.replace(header(scheme=scheme, rotation_block=block), stochastic=False)
    biased = wire.decode(encoded_as(values, "w", nearest), "w", nearest) - values
    assert np.abs(biased).max() > 2 * allowed


def test_equal_seeds_give_equal_bytes_and_names_and_seeds_differ() -> None:
    def sent(name: str, seed: int) -> bytes:
        head = header(seed=seed, rotation_block=64)
        return pack(Bundle({"w": encoded_as(normal((40, 40)), name, head)}))

    assert sent("a", 1) == sent("a", 1)
    assert len({sent("a", 1), sent("a", 2), sent("b", 1), sent("b", 2), sent("a", 2**64 - 1)}) == 5


def test_rotation_needs_the_seed_and_the_name_of_its_header() -> None:
    values = normal((40, 64))
    head = header(scheme="int8-block64", rotation_block=64)
    encoded = encoded_as(values, "w", head)

    assert error_metrics(values, wire.decode(encoded, "w", head)).sqnr_db > 35
    for name, other in (("v", head), ("w", dataclasses.replace(head, seed=8))):
        assert error_metrics(values, wire.decode(encoded, name, other)).sqnr_db < 3


@pytest.mark.parametrize("scheme", ["int3000", "", "nf4", "int8", "Int4"])
def test_unknown_scheme_is_refused(scheme: str) -> None:
    with pytest.raises(wire.UnknownSchemeError, match="unknown wire scheme"):
        wire.check_header(header(scheme=scheme))
    with pytest.raises(wire.UnknownSchemeError, match="unknown wire scheme"):
        wire.scheme_codec(scheme, top_share=0.1)


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(wire.UnknownSchemeError, match=f"wire version {version} is not 1"):
        wire.check_header(header(version=version))


def test_codec_of_another_scheme_is_refused() -> None:
    values = normal((40, 64))
    int2 = encoded_as(values, "w", header(scheme="int2"))
    with pytest.raises(QuantizationError, match="'int2' is none of the wire scheme int4"):
        wire.decode(int2, "w", header())
    assert wire.decode(int2, "w", header(scheme="adaptive")).shape == (40, 64)
    # tensors that are too small travel in 16 bits in every scheme
    half = wire.encode(values, "w", header(), wire.small_codec(values[:1]))  # type: ignore[arg-type]
    np.testing.assert_allclose(wire.decode(half, "w", header()), values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (np.zeros((2, 10), np.float32), "fp16"),
        (np.zeros(5000, np.float32), "fp16"),
        (np.full(3, 1e6, np.float32), "fp32"),
        (np.zeros((0, 0), np.float32), "fp16"),
    ],
)
def test_small_tensors_and_vectors_take_16_bits_where_they_fit(values: Float32, name: str) -> None:
    codec = wire.small_codec(values)
    assert codec is not None
    assert codec.name == name
    assert wire.small_codec(np.zeros((2, 256), np.float32)) is None


def repetitive() -> Bundle:
    names = [f"encoder.layer.{i}.attention.self.query.lora_A.weight" for i in range(24)]
    head = header(scheme="int1", stochastic=False)
    return Bundle(
        {n: encoded_as(normal((8, 384), i), n, head) for i, n in enumerate(names)},
        {"examples": 20.0, "rank": 8.0},
        head,
    )


def test_compression_saves_the_framing_and_gives_the_same_bundle() -> None:
    bundle = repetitive()
    small = wire.compressed(bundle)
    again = wire.expanded(unpack(pack(small)), max_bytes=1 << 20)

    assert pack(again) == pack(bundle)
    codes = sum(tensor.nbytes for tensor in bundle.tensors.values())
    assert len(pack(bundle)) > 1.2 * codes
    assert len(pack(small)) < 1.08 * codes


def test_compression_that_does_not_pay_leaves_the_bundle_alone() -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(4096), np.uint8)
    bundle = Bundle({"w": Encoded("int1", (4096,), {"x": noise})})
    assert wire.compressed(bundle) is bundle
    assert wire.expanded(bundle, max_bytes=10) is bundle


def holder(data: bytes, **more: np.ndarray) -> Bundle:
    parts = {"data": np.frombuffer(data, np.uint8), **more}
    return Bundle({"zlib": Encoded("zlib", (len(data),), parts)})


def test_bomb_is_refused_before_it_unpacks() -> None:
    bomb = zlib.compress(bytes(64 << 20), 1)
    assert len(bomb) < 400_000
    tracemalloc.start()
    with pytest.raises(QuantizationError, match="unpack to more than 100000 bytes"):
        wire.expanded(holder(bomb), max_bytes=100_000)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000  # the bomb's own bytes included
    tracemalloc.stop()


def test_limit_is_exact() -> None:
    whole = pack(repetitive())
    squeezed = holder(zlib.compress(whole))
    assert pack(wire.expanded(squeezed, max_bytes=len(whole))) == whole
    with pytest.raises(QuantizationError, match="more than"):
        wire.expanded(squeezed, max_bytes=len(whole) - 1)


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        (holder(b"not zlib at all"), "damaged"),
        (holder(b""), "cut off"),
        (holder(zlib.compress(pack(repetitive()))[:-5]), "cut off"),
        (holder(zlib.compress(pack(repetitive())) + b"more"), "something follows"),
        (holder(b"x", extra=np.zeros(1)), "one tensor with the part 'data' alone"),
    ],
    ids=["no zlib", "empty", "cut off", "longer", "extra part"],
)
def test_damaged_compression_is_refused(bundle: Bundle, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        wire.expanded(bundle, max_bytes=1 << 20)


def test_compressed_rubbish_is_no_bundle() -> None:
    with pytest.raises(MalformedTensorError):
        wire.expanded(holder(zlib.compress(b"\xff" * 100)), max_bytes=1 << 20)


def test_bundle_within_a_bundle_within_a_bundle_is_not_followed() -> None:
    inner = holder(zlib.compress(pack(repetitive())))
    again = wire.expanded(holder(zlib.compress(pack(inner))), max_bytes=1 << 20)
    assert set(again.tensors) == {"zlib"}
