# SPDX-License-Identifier: Apache-2.0
"""The numpy codecs against bitsandbytes on the CPU, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")
bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

from lorikit.proto.tensors import Encoded  # noqa: E402  # after the skip
from lorikit.quantization import QuantizationError, codec  # noqa: E402
from lorikit.quantization._double import DYNAMIC_LEVELS  # noqa: E402
from lorikit.quantization.backends.bitsandbytes import BitsandbytesCodec  # noqa: E402
from lorikit.quantization.base import Float32  # noqa: E402
from lorikit.quantization.fp4 import FP4  # noqa: E402
from lorikit.quantization.nf4 import NF4  # noqa: E402

FOUR_BITS = {"nf4": NF4, "fp4": FP4}
LENGTHS = [1, 2, 3, 63, 64, 65, 127, 129, 1000, 65_536, 65_537, 131_073]


def assert_same(encoded: Encoded, expected: Encoded) -> None:
    """Same codec, shape and bytes of every part."""
    assert (encoded.codec, encoded.shape) == (expected.codec, expected.shape)
    assert sorted(encoded.parts) == sorted(expected.parts)
    for role, part in encoded.parts.items():
        assert part.dtype == expected.parts[role].dtype
        np.testing.assert_array_equal(part, expected.parts[role], err_msg=role)
        assert part.tobytes() == expected.parts[role].tobytes(), role


def assert_same_four_bits(values: Float32, name: str) -> None:
    """Codes, magnitudes and decoded values equal those of bitsandbytes."""
    packed, state = bnb.quantize_4bit(torch.from_numpy(values.copy()), quant_type=name)
    parts = {"codes": packed.numpy().reshape(-1), "absmax": state.absmax.numpy()}
    encoded = codec(name).encode(values)
    assert_same(encoded, Encoded(name, values.shape, parts))
    decoded = bnb.dequantize_4bit(packed, state).numpy().reshape(values.shape)
    np.testing.assert_array_equal(codec(name).decode(encoded), decoded)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_tables_are_those_of_bitsandbytes(name: str) -> None:
    levels = bnb.get_4bit_type(name, device="cpu").numpy()
    np.testing.assert_array_equal(FOUR_BITS[name].table.levels, levels)


def test_dynamic_levels_are_those_of_bitsandbytes() -> None:
    expected = bnb.create_dynamic_map().numpy()
    # torch.linspace rounds once or twice, depending on whether the processor fuses multiply and add
    np.testing.assert_array_max_ulp(DYNAMIC_LEVELS, expected, maxulp=1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bits_equal_bitsandbytes(name: str, length: int) -> None:
    rng = np.random.default_rng(length)
    assert_same_four_bits(rng.standard_normal(length).astype(np.float32), name)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-30, 1e37])
@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bits_equal_bitsandbytes_at_the_ends_of_float32(name: str, scale: float) -> None:
    values = np.random.default_rng(1).uniform(-4, 4, 333)
    assert_same_four_bits((values * scale).astype(np.float32), name)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_ties_between_levels_go_where_bitsandbytes_sends_them(name: str) -> None:
    bounds = FOUR_BITS[name].table.bounds
    up, down = (np.nextafter(bounds, np.float32(way)) for way in (2, -2))
    zeros = np.array([0.0, -0.0], np.float32)
    around = np.concatenate([bounds, up, down, FOUR_BITS[name].table.levels, zeros])
    values = np.stack([np.append(np.float32(1), around)[:64]] * 3)
    values[1] *= -1
    assert values.shape == (3, 64)
    assert_same_four_bits(values, name)
    assert_same_four_bits(np.append(values.reshape(-1), values[0, :61]), name)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_zero_blocks_equal_bitsandbytes(name: str) -> None:
    values = np.random.default_rng(2).standard_normal(64 * 4 + 7).astype(np.float32)
    values[64:128] = 0
    values[256:] = 0
    assert_same_four_bits(values, name)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 33), (48, 130), (1, 1)])
@pytest.mark.parametrize("name", FOUR_BITS)
def test_blocks_run_across_rows_as_in_bitsandbytes(name: str, shape: tuple[int, ...]) -> None:
    assert_same_four_bits(np.random.default_rng(3).standard_normal(shape).astype(np.float32), name)


@pytest.mark.parametrize("name", FOUR_BITS)
@given(
    length=st.integers(1, 300),
    seed=st.integers(0, 999),
    exponents=st.tuples(st.integers(-46, 37), st.integers(-46, 37)),
)
@settings(max_examples=100)
def test_any_values_equal_bitsandbytes(
    name: str, length: int, seed: int, exponents: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    exponent = rng.uniform(min(exponents), max(exponents), length)
    assert_same_four_bits((rng.uniform(-1, 1, length) * 10.0**exponent).astype(np.float32), name)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_double_quantised_parts_decode_as_in_bitsandbytes(name: str) -> None:
    values = np.random.default_rng(4).standard_normal((300, 130)).astype(np.float32)
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(values), quant_type=name, compress_statistics=True
    )
    parts = {
        "codes": packed.numpy().reshape(-1),
        "absmax": state.absmax.numpy(),
        "nested_absmax": state.state2.absmax.numpy(),
        "nested_offset": state.offset.numpy().reshape(1),
    }
    expected = bnb.dequantize_4bit(packed, state).numpy()
    decoded = codec(f"{name}-dq").decode(Encoded(f"{name}-dq", values.shape, parts))
    # the levels may differ by their last bit, see above
    np.testing.assert_allclose(decoded, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_double_quantised_magnitudes_are_no_worse_than_those_of_bitsandbytes(name: str) -> None:
    values = np.random.default_rng(5).standard_normal((300, 130)).astype(np.float32)
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(values), quant_type=name, compress_statistics=True
    )
    encoded = codec(f"{name}-dq").encode(values)
    np.testing.assert_array_equal(encoded.parts["codes"], packed.numpy().reshape(-1))
    floats = {role: part.astype(np.float32) for role, part in encoded.parts.items()}
    # two sums of 610 magnitudes of about 2.5, one in float32
    np.testing.assert_allclose(floats["nested_offset"], state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(floats["nested_absmax"], state.state2.absmax.numpy(), rtol=1e-5)
    ours, theirs = (
        np.square(each - values, dtype=np.float64).sum()
        for each in (
            codec(f"{name}-dq").decode(encoded),
            bnb.dequantize_4bit(packed, state).numpy(),
        )
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    differ = encoded.parts["absmax"].astype(int) - state.absmax.numpy()
    assert np.abs(differ).max() <= 1
    assert np.count_nonzero(differ) <= 0.01 * differ.size


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 130), (4, 2048)])
def test_int8_codes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    codes, statistic, _ = bnb.int8_vectorwise_quant(torch.from_numpy(values.copy()))
    encoded = codec("int8").encode(values)
    np.testing.assert_array_equal(encoded.parts["codes"], codes.numpy())
    expected = bnb.int8_vectorwise_dequant(codes, statistic).numpy()
    # bitsandbytes multiplies by the statistic and by 1 / 127 in two steps
    np.testing.assert_allclose(codec("int8").decode(encoded), expected, rtol=3e-7)


def test_int8_values_between_two_codes_go_where_bitsandbytes_sends_them() -> None:
    rng = np.random.default_rng(9)
    largest = rng.uniform(1, 2, (400, 1)).astype(np.float32)
    halves = (rng.integers(-127, 127, (400, 200)) + 0.5) * largest.astype(np.float64) / 127
    values = np.hstack([largest, halves.astype(np.float32)])
    codes, _, _ = bnb.int8_vectorwise_quant(torch.from_numpy(values.copy()))
    np.testing.assert_array_equal(codec("int8").encode(values).parts["codes"], codes.numpy())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (65,), (5, 7), (2, 3, 33), (3, 0), (300, 130)])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_backend_gives_the_same_tensor(name: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    backend = BitsandbytesCodec(name)
    encoded = backend.encode(values)
    assert_same(encoded, codec(name).encode(values))
    np.testing.assert_array_equal(backend.decode(encoded), codec(name).decode(encoded))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_backend_gives_the_same_tensor_for_zero_and_denormal_rows(name: str) -> None:
    values = np.random.default_rng(8).standard_normal((6, 64)).astype(np.float32)
    values[[1, 3]] *= np.array([[0], [1e-40]], np.float32)
    assert_same(BitsandbytesCodec(name).encode(values), codec(name).encode(values))


def test_backend_refuses_what_it_cannot_do() -> None:
    values = np.ones((2, 64), np.float32)
    with pytest.raises(QuantizationError, match="no codec 'int4'; it has fp4, int8, nf4"):
        BitsandbytesCodec("int4")
    with pytest.raises(QuantizationError, match="no stochastic rounding"):
        BitsandbytesCodec("int8").encode(values, rng=np.random.default_rng(0))
    with pytest.raises(QuantizationError, match="not finite"):
        BitsandbytesCodec("nf4").encode(values * np.float32(np.nan))
