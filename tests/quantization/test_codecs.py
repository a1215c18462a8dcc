# SPDX-License-Identifier: Apache-2.0
"""What holds for every codec: one test class, subclassed per codec."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.proto.tensors import Bundle, Encoded, pack, unpack
from lorikit.quantization import CODECS, QuantizationError, codec
from lorikit.quantization.base import Float32
from lorikit.quantization.fp4 import LEVELS as FP4_LEVELS
from lorikit.quantization.nf4 import LEVELS as NF4_LEVELS

TINY = float(np.finfo(np.float32).tiny)
SHAPES = [(), (0,), (1,), (3,), (64,), (65,), (3, 0), (0, 4), (5, 7), (2, 3, 33), (4, 130)]


def normal(shape: tuple[int, ...], seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class CodecContract:
    """Tests of one codec; a subclass gives its name and the error it allows."""

    name: str
    bits: float
    """Bits a weight of a large matrix."""
    smallest: float = TINY
    """Magnitudes below it may be lost altogether."""

    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64] | float:
        """Largest error allowed, by element."""
        raise NotImplementedError

    def round_trip(self, values: Float32) -> Float32:
        encoded = codec(self.name).encode(values)
        decoded = codec(self.name).decode(encoded)
        assert decoded.dtype == np.float32
        assert decoded.shape == encoded.shape == values.shape
        assert np.all(np.abs(decoded - values.astype(np.float64)) <= self.bound(values, encoded))
        return decoded

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_any_shape_comes_back_within_the_bound(self, shape: tuple[int, ...]) -> None:
        self.round_trip(normal(shape))

    def test_values_that_need_several_chunks_come_back_within_the_bound(self) -> None:
        self.round_trip(normal((301, 1003)))

    def test_zero_tensor_is_exact(self) -> None:
        assert not self.round_trip(np.zeros((3, 70), np.float32)).any()

    def test_zero_block_beside_others_is_exact(self) -> None:
        values = normal((3, 256))
        values[1] = 0
        assert not self.round_trip(values)[1].any()

    @pytest.mark.parametrize("value", [0.3125, -2.5, 1e-42, -1e-45, 3e-38])
    def test_constant_tensor_comes_back_within_a_rounding_error(self, value: float) -> None:
        decoded = self.round_trip(np.full((3, 70), value, np.float32))
        lost = max(0.01 * abs(value), self.smallest)
        assert np.all(np.abs(decoded - value) <= lost)

    def test_last_axis_may_lie_strided_in_memory(self) -> None:
        strided = normal((6, 140))[::2, ::2]
        expected = codec(self.name).encode(strided.copy())
        for role, part in codec(self.name).encode(strided).parts.items():
            np.testing.assert_array_equal(part, expected.parts[role])

    def test_input_is_not_changed_and_may_be_read_only(self) -> None:
        values = normal((5, 70))
        values.flags.writeable = False
        before = values.copy()
        self.round_trip(values)
        np.testing.assert_array_equal(values, before)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("where", [(0, 0), (2, 69)])
    def test_value_that_is_not_finite_is_refused_by_index(
        self, bad: float, where: tuple[int, int]
    ) -> None:
        values = normal((3, 70))
        values[where] = bad
        message = rf"value {bad} at \[{where[0]}, {where[1]}\] of shape \(3, 70\) is not finite"
        with pytest.raises(QuantizationError, match=message):
            codec(self.name).encode(values)

    def test_large_matrix_takes_the_stated_bits(self) -> None:
        values = normal((256, 1024))
        bits = 8 * codec(self.name).encode(values).nbytes / values.size
        assert bits == pytest.approx(self.bits, abs=0.01)

    def test_parts_survive_the_wire(self) -> None:
        for shape in SHAPES:
            encoded = codec(self.name).encode(normal(shape))
            received = unpack(pack(Bundle({"w": encoded}))).tensors["w"]
            np.testing.assert_array_equal(
                codec(self.name).decode(received), codec(self.name).decode(encoded)
            )

    def test_missing_or_extra_part_is_refused(self) -> None:
        encoded = codec(self.name).encode(normal((3, 70)))
        for role in encoded.parts:
            rest = {name: part for name, part in encoded.parts.items() if name != role}
            self.refuses(dataclasses.replace(encoded, parts=rest), "expected")
        extra = {**encoded.parts, "more": np.zeros(1, np.float32)}
        self.refuses(dataclasses.replace(encoded, parts=extra), "more")

    def test_part_of_another_type_or_shape_is_refused(self) -> None:
        encoded = codec(self.name).encode(normal((3, 70)))
        for role, part in encoded.parts.items():
            wrong = np.int64 if part.dtype != np.int64 else np.int32
            same_width = np.dtype(f"V{part.dtype.itemsize}")
            for changed in (
                part.astype(wrong),
                part.view(same_width),
                part.astype(part.dtype.newbyteorder(">")) if part.dtype.itemsize > 1 else part[:0],
                part.reshape(-1)[:-1],
                np.append(part.reshape(-1), part.reshape(-1)[:1]),
                part[np.newaxis],
            ):
                parts = {**encoded.parts, role: changed}
                self.refuses(dataclasses.replace(encoded, parts=parts), repr(role))

    def test_part_that_is_too_short_for_a_huge_shape_is_refused(self) -> None:
        encoded = codec(self.name).encode(normal((3, 70)))
        self.refuses(dataclasses.replace(encoded, shape=(1 << 30, 1 << 30)), "needs")

    @pytest.mark.parametrize("shape", [(-1,), (1 << 62, 1 << 62, 0), (0, 1 << 63)])
    def test_impossible_shape_is_refused(self, shape: tuple[int, ...]) -> None:
        encoded = codec(self.name).encode(normal((3, 70)))
        self.refuses(dataclasses.replace(encoded, shape=shape), "no tensor has the shape")

    def test_tensor_of_another_codec_is_refused(self) -> None:
        other = "fp16" if self.name == "fp32" else "fp32"
        self.refuses(codec(other).encode(normal((3, 70))), f"cannot decode a tensor of '{other}'")

    def refuses(self, encoded: Encoded, message: str) -> None:
        with pytest.raises(QuantizationError, match=message):
            codec(self.name).decode(encoded)


class IntegerContract(CodecContract):
    """A codec with steps: half a step to nearest, and stochastic rounding."""

    def step(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        """Step of each element, in the shape of the values."""
        raise NotImplementedError

    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        # 127 steps are known to about 2**-16 of a step in float32 products
        return self.step(values, encoded) * (0.5 + 1e-4)

    def test_stochastic_rounding_has_the_right_mean(self) -> None:
        values = normal((3, 130))
        rng = np.random.default_rng(7)
        draws = [codec(self.name).encode(values, rng=rng) for _ in range(2000)]
        mean = np.mean([codec(self.name).decode(draw) for draw in draws], axis=0)
        # a draw has at most a standard deviation of half a step; 5 of them over 390 values
        allowed = 5 * 0.5 / math.sqrt(len(draws)) * self.step(values, draws[0])
        assert np.all(np.abs(mean - values) <= allowed)

    def test_stochastic_rounding_moves_less_than_a_step(self) -> None:
        values = normal((5, 200))
        encoded = codec(self.name).encode(values, rng=np.random.default_rng(3))
        error = np.abs(codec(self.name).decode(encoded) - values)
        assert np.all(error <= (1 + 1e-4) * self.step(values, encoded))
        assert error.max() > 0.6 * self.step(values, encoded).min()

    def test_stochastic_rounding_repeats_with_its_seed(self) -> None:
        values = normal((50, 70))
        first, again, other = (
            codec(self.name).encode(values, rng=np.random.default_rng(seed)).parts["codes"]
            for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    def test_values_on_the_grid_are_exact(self) -> None:
        codes = np.arange(-7, 8, dtype=np.float32)
        codes[0] = -127 if "int8" in self.name else -7
        np.testing.assert_array_equal(self.round_trip(codes), codes)


class TableContract(CodecContract):
    """A codec with a table of levels per block of 64."""

    levels: Float32

    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        gap = np.diff(np.sort(self.levels)).max() / 2
        largest = blockwise(values, lambda block: np.abs(block).max())
        # the levels are exact to 2**-24; bitsandbytes divides by no less than 1e-38
        return np.where(largest < 1e-38, 1e-38, (gap + 1e-6) * largest)


class SimpleTableContract(TableContract):
    def test_every_level_is_the_nearest(self) -> None:
        values = normal((64, 64))
        decoded = codec(self.name).decode(codec(self.name).encode(values))
        largest = np.abs(values).max(axis=1, keepdims=True).astype(np.float64)
        reach = np.abs(values[..., np.newaxis] - largest[..., np.newaxis] * self.levels).min(axis=2)
        assert np.all(np.abs(decoded - values) <= reach + 1e-6 * largest)


class DoubleTableContract(TableContract):
    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        # the 8-bit magnitudes are at most half the widest gap of their levels off, 0.0141 / 2
        nested = encoded.parts["nested_absmax"].max(initial=0)
        offset = np.abs(encoded.parts["nested_offset"]).max()
        simple = super().bound(values, encoded)
        return simple + 0.00704 * float(nested) + 1e-6 * float(offset) + TINY

    def test_codes_are_those_without_double_quantisation(self) -> None:
        simple = codec(self.name.removesuffix("-dq")).encode(normal((64, 64)))
        double = codec(self.name).encode(normal((64, 64)))
        np.testing.assert_array_equal(double.parts["codes"], simple.parts["codes"])


def blockwise(values: Float32, statistic: object, block: int = 64) -> npt.NDArray[np.float64]:
    """A number per block of the flattened values, in the shape of the values."""
    flat = values.reshape(-1).astype(np.float64)
    out = np.empty(flat.size)
    for start in range(0, flat.size, block):
        out[start : start + block] = statistic(flat[start : start + block])  # type: ignore[operator]  # a callable
    return out.reshape(values.shape)


def wire_step(values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
    """Step of each element of a flat codec: its scale is the upper half of a float32."""
    halves = encoded.parts["scale"].astype(np.uint32) << 16
    steps = np.abs(halves.view(np.float32)).astype(np.float64)
    return np.repeat(steps, 64)[: values.size].reshape(values.shape)


class TestFp32(CodecContract):
    name, bits = "fp32", 32.0

    def bound(self, values: Float32, encoded: Encoded) -> float:
        return 0.0


class TestFp16(CodecContract):
    name, bits, smallest = "fp16", 16.0, 2.0**-25

    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        return 2.0**-11 * np.abs(values.astype(np.float64)) + 2.0**-25

    def test_values_are_those_of_numpy(self) -> None:
        values = np.array([65519.996, -65519.996, 5.9604645e-08, 1.0009765], np.float32)
        encoded = codec("fp16").encode(values)
        np.testing.assert_array_equal(encoded.parts["values"], values.astype(np.float16))

    @pytest.mark.parametrize("value", [65520.0, -65520.0, 3e38])
    def test_value_beyond_its_range_is_refused(self, value: float) -> None:
        with pytest.raises(QuantizationError, match=r"at \[1\] of shape \(2,\) exceeds fp16"):
            codec("fp16").encode(np.array([1.0, value], np.float32))


class TestBf16(CodecContract):
    name, bits = "bf16", 16.0

    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        return 2.0**-8 * np.abs(values.astype(np.float64)) + 2.0**-134

    def test_ties_go_to_even(self) -> None:
        halves = np.array([0x3F80, 0x3F81], np.uint32) << 16 | 0x8000
        encoded = codec("bf16").encode(halves.view(np.float32))
        np.testing.assert_array_equal(encoded.parts["values"], [0x3F80, 0x3F82])

    def test_value_beyond_its_range_is_refused(self) -> None:
        largest = np.array([0x7F7F7FFF, 0x7F7F8000], np.uint32).view(np.float32)
        codec("bf16").encode(largest[:1])
        with pytest.raises(QuantizationError, match="exceeds bf16"):
            codec("bf16").encode(-largest[1:])


class TestInt8(IntegerContract):
    name, bits = "int8", 8 + 32 / 1024

    def step(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        columns = values.shape[-1] if values.ndim else 1
        steps = encoded.parts["scale"].astype(np.float64)
        return np.repeat(steps, columns).reshape(values.shape)

    def test_parts_are_rows_of_codes_and_a_scale_a_row(self) -> None:
        encoded = codec("int8").encode(np.array([[1, -2, 0.5], [0, 0, 12.7]], np.float32))
        np.testing.assert_array_equal(encoded.parts["codes"], [[64, -127, 32], [0, 0, 127]])
        scale = encoded.parts["scale"].astype(np.float32)
        np.testing.assert_allclose(scale, np.array([2 / 127, 0.1]), rtol=1e-6)


class TestInt8Blocks(IntegerContract):
    name, bits = "int8-block64", 8.25

    def step(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        return wire_step(values, encoded)

    def test_short_tensor_carries_no_padding(self) -> None:
        assert codec(self.name).encode(normal((3,))).nbytes == 3 + 2


class TestInt4(IntegerContract):
    name, bits = "int4", 4.25

    def step(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        return wire_step(values, encoded)

    def test_short_tensor_carries_no_padding(self) -> None:
        assert codec(self.name).encode(normal((3,))).nbytes == 2 + 2

    def test_low_nibble_comes_first_and_eight_is_zero(self) -> None:
        encoded = codec(self.name).encode(np.array([-8, 0, 7, 3, -1], np.float32))
        np.testing.assert_array_equal(encoded.parts["codes"], [0x80, 0xBF, 0x87])

    def test_short_range_gets_the_finer_step(self) -> None:
        values = np.array([8, -7.5, 0.5], np.float32)
        encoded = codec(self.name).encode(values)
        np.testing.assert_array_equal(self.step(values, encoded), 1.0)
        np.testing.assert_array_equal(codec(self.name).decode(encoded), [8, -7, 0])


class RowBlocksContract(IntegerContract):
    @property
    def block(self) -> int:
        return int(self.name.partition("-row")[2])

    def step(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        columns = values.shape[-1] if values.ndim else 1
        steps = np.abs(encoded.parts["scale"].astype(np.float64))
        return np.repeat(steps, self.block, axis=-1)[:, :columns].reshape(values.shape)


class Int8RowsContract(RowBlocksContract):
    def test_block_ends_with_its_row(self) -> None:
        encoded = codec(self.name).encode(normal((3, self.block + 1)))
        assert encoded.parts["codes"].shape == (3, 2, self.block)
        assert encoded.parts["scale"].shape == (3, 2)
        np.testing.assert_array_equal(encoded.parts["codes"][:, 1, 1:], 128)


class TestInt8Rows32(Int8RowsContract):
    name, bits = "int8-row32", 9.0


class TestInt8Rows64(Int8RowsContract):
    name, bits = "int8-row64", 8.5


class TestInt8Rows128(Int8RowsContract):
    name, bits = "int8-row128", 8.25


class Int4RowsContract(RowBlocksContract):
    def test_block_ends_with_its_row(self) -> None:
        encoded = codec(self.name).encode(normal((3, self.block + 1)))
        assert encoded.parts["codes"].shape == (3, 2, self.block // 2)
        assert encoded.parts["scale"].shape == (3, 2)
        padding = encoded.parts["codes"][:, 1].astype(np.uint8)
        padding[:, 0] |= 0x0F
        np.testing.assert_array_equal(padding[:, 0], 0x8F)
        np.testing.assert_array_equal(padding[:, 1:], 0x88)


class TestInt4Rows32(Int4RowsContract):
    name, bits = "int4-row32", 5.0


class TestInt4Rows64(Int4RowsContract):
    name, bits = "int4-row64", 4.5


class TestInt4Rows128(Int4RowsContract):
    name, bits = "int4-row128", 4.25


class BitPlanesContract(CodecContract):
    """A codec whose scale follows from its codes by least squares."""

    block = 64

    def norms(self, values: Float32) -> npt.NDArray[np.float64]:
        return blockwise(values, lambda block: np.sqrt(block @ block), self.block)

    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        # 2**-8 is the rounding of the scale, TINY what denormals lose
        return self.norms(values) * (1 + 2.0**-8) + TINY

    @pytest.mark.parametrize("draw", ["normal", "laplace", "cauchy"])
    def test_error_of_a_block_is_never_longer_than_the_block(self, draw: str) -> None:
        rng = np.random.default_rng(5)
        values = getattr(rng, f"standard_{draw}" if draw != "laplace" else draw)(size=(40, 130))
        values = values.astype(np.float32)
        error = self.round_trip(values) - values
        assert np.all(self.norms(error) <= 0.999 * self.norms(values))

    def test_stochastic_rounding_has_the_right_mean(self) -> None:
        values = normal((3, 70))
        rng = np.random.default_rng(7)
        draws = [codec(self.name).encode(values, rng=rng) for _ in range(2000)]
        mean = np.mean([codec(self.name).decode(draw) for draw in draws], axis=0)
        # a draw has at most a standard deviation of half a step, which is a scale; 5 of them
        halves = draws[0].parts["scale"].astype(np.uint32) << 16
        scales = np.repeat(halves.view(np.float32), self.block)[: values.size]
        allowed = 5 / math.sqrt(len(draws)) * scales.reshape(values.shape)
        assert np.all(np.abs(mean - values) <= allowed)

    def test_stochastic_rounding_repeats_with_its_seed(self) -> None:
        first, again, other = (
            codec(self.name).encode(normal((50, 70)), rng=np.random.default_rng(seed))
            for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first.parts["planes"], again.parts["planes"])
        assert (first.parts["planes"] != other.parts["planes"]).any()

    @pytest.mark.parametrize("seed", [None, 1])
    def test_zero_stays_zero_whatever_the_rounding(self, seed: int | None) -> None:
        rng = None if seed is None else np.random.default_rng(seed)
        encoded = codec(self.name).encode(np.zeros((3, 70), np.float32), rng=rng)
        assert not codec(self.name).decode(encoded).any()

    def test_short_tensor_carries_no_padding(self) -> None:
        bits = int(self.name.removeprefix("int"))
        assert codec(self.name).encode(normal((9,))).nbytes == 2 * bits + 2


class TestInt1(BitPlanesContract):
    name, bits, block = "int1", 1.125, 128

    def test_codes_are_signs_and_the_scale_is_the_mean_magnitude(self) -> None:
        encoded = codec("int1").encode(np.array([3, -1, 1, 3, -2], np.float32))
        np.testing.assert_array_equal(encoded.parts["planes"], [[0b10110000]])
        np.testing.assert_array_equal(codec("int1").decode(encoded), [2, -2, 2, 2, -2])


class TestInt2(BitPlanesContract):
    name, bits = "int2", 2.25

    def test_planes_hold_the_high_bits_first(self) -> None:
        encoded = codec("int2").encode(np.array([3, 1, -1, -3], np.float32))
        np.testing.assert_array_equal(encoded.parts["planes"], [[0b11000000], [0b10100000]])
        np.testing.assert_array_equal(codec("int2").decode(encoded), [3, 1, -1, -3])


class TestInt3(BitPlanesContract):
    name, bits = "int3", 3.25


class TestInt6(BitPlanesContract):
    name, bits = "int6", 6.25


class TestTopK(CodecContract):
    name, bits = "topk", 17.3 / 64

    def bound(self, values: Float32, encoded: Encoded) -> npt.NDArray[np.float64]:
        # what is dropped is lost, what is kept has 8 bits of its own block's largest magnitude
        magnitudes = np.abs(values.astype(np.float64))
        return magnitudes + magnitudes.max(initial=0) / 253 + TINY

    @pytest.mark.parametrize("value", [0.3125, -2.5, 1e-42, -1e-45, 3e-38])
    def test_constant_tensor_comes_back_within_a_rounding_error(self, value: float) -> None:
        decoded = self.round_trip(np.full((3, 70), value, np.float32)).reshape(-1)
        assert np.count_nonzero(decoded[4:]) == 0  # ceil(210 / 64) are kept, the first ones
        assert np.all(np.abs(decoded[:4] - value) <= max(0.01 * abs(value), TINY))

    def test_part_of_another_type_or_shape_is_refused(self) -> None:
        encoded = codec("topk").encode(normal((3, 70)))
        for role in encoded.parts:
            wrong = encoded.parts[role].astype(np.int64)
            parts = {**encoded.parts, role: wrong}
            self.refuses(dataclasses.replace(encoded, parts=parts), repr(role))
        for role in encoded.parts:
            parts = {**encoded.parts, role: encoded.parts[role][:-1]}
            self.refuses(dataclasses.replace(encoded, parts=parts), "part")

    def test_part_that_is_too_short_for_a_huge_shape_is_refused(self) -> None:
        encoded = codec("topk").encode(normal((3, 70)))
        self.refuses(dataclasses.replace(encoded, shape=(1 << 30, 1 << 30)), "4 values cannot fill")
        self.refuses(dataclasses.replace(encoded, shape=(2, 1)), "needs int8 of at most 2")


class TestNf4(SimpleTableContract):
    name, bits, levels = "nf4", 4.5, NF4_LEVELS


class TestFp4(SimpleTableContract):
    name, bits, levels = "fp4", 4.5, FP4_LEVELS


class TestNf4Double(DoubleTableContract):
    name, bits, levels = "nf4-dq", 4 + 1 / 8 + 1 / 512, NF4_LEVELS


class TestFp4Double(DoubleTableContract):
    name, bits, levels = "fp4-dq", 4 + 1 / 8 + 1 / 512, FP4_LEVELS


CONTRACTS: list[type[CodecContract]] = [
    value
    for name, value in list(globals().items())
    if name.startswith("Test") and issubclass(value, CodecContract)
]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
@given(
    shape=st.lists(st.integers(0, 70), max_size=3).map(tuple),
    seed=st.integers(0, 99),
    exponent=st.integers(-44, 37),
)
@settings(max_examples=60)
def test_values_of_any_shape_and_size_come_back_within_the_bound(
    contract: type[CodecContract], shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    largest = 4 if contract.name == "fp16" else 37
    unit = np.random.default_rng(seed).uniform(-1, 1, shape)
    contract().round_trip((unit * 10.0 ** min(exponent, largest)).astype(np.float32))


def test_every_codec_is_tested_here() -> None:
    assert {contract.name for contract in CONTRACTS} == set(CODECS)
