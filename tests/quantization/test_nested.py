# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

import numpy as np
import pytest

from lorikit.quantization import QuantizationError, codec, error_metrics
from lorikit.quantization.nested import coarse, cut, nested, refined, residual
from lorikit.quantization.patches import Step, packed_patch, patched

SHAPES = [(3, 64), (5, 130), (1, 1), (0, 64), (7, 32), (4, 3, 96)]


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_int4_part_and_the_residual_make_the_int8_codes(
    shape: tuple[int, ...], block: int
) -> None:
    fine = nested(normal(shape), block)

    part = coarse(fine)

    assert part.codec == f"int4-row{block}"
    joined = refined(part.parts["codes"], residual(fine))  # type: ignore[arg-type]  # codes
    np.testing.assert_array_equal(joined, fine.parts["codes"].reshape(-1))
    np.testing.assert_array_equal(part.parts["scale"] / np.float32(16), fine.parts["scale"])
    np.testing.assert_array_equal(cut(joined), part.parts["codes"].reshape(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_stay_below_half_a_step(shape: tuple[int, ...]) -> None:
    values = normal(shape, 1)
    fine = nested(values)

    for encoded, slack in ((fine, 1.0), (coarse(fine), 1.07)):
        steps = np.repeat(np.abs(encoded.parts["scale"]), 64, axis=1)[:, : shape[-1]]
        error = np.abs(codec(encoded.codec).decode(encoded) - values).reshape(steps.shape)
        # The coarse part rounds twice: half its own step and half a fine one, a sixteenth of it.
        assert (error <= slack * 0.5 * steps * (1 + 1e-5)).all()


def test_nesting_costs_little_of_either_precision() -> None:
    values = normal((256, 512), 2)
    fine = nested(values)

    def lost(encoded: object, plain: str) -> float:
        own = error_metrics(values, codec(encoded.codec).decode(encoded)).sqnr_db  # type: ignore[attr-defined]
        best = codec(plain)
        return error_metrics(values, best.decode(best.encode(values))).sqnr_db - own

    assert lost(fine, "int8-row64") < 0.7
    assert lost(coarse(fine), "int4-row64") < 0.7


@pytest.mark.parametrize("value", [0.0, 1.5, -2.5, 1e-41, -1e-41])
def test_a_constant_block_is_off_by_half_a_step_at_most(value: float) -> None:
    values = np.full((2, 64), value, np.float32)
    fine = nested(values)

    decoded = codec(fine.codec).decode(fine)

    assert np.abs(decoded - values).max() <= 0.5 * np.abs(fine.parts["scale"]).max()
    assert codec("int4-row64").decode(coarse(fine)).shape == (2, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_place(value: float) -> None:
    values = normal((2, 64))
    values[1, 3] = value

    with pytest.raises(QuantizationError, match=r"at \[1, 3\] of shape \(2, 64\) is not finite"):
        nested(values)


def test_codes_that_are_not_nested_have_no_int4_part() -> None:
    plain = codec("int8-row64").encode(np.ones((1, 64), np.float32))

    with pytest.raises(QuantizationError, match="codes are not nested"):
        coarse(plain)
    with pytest.raises(QuantizationError, match="'nf4' is not one of int8-row32"):
        coarse(codec("nf4").encode(normal((1, 64))))


def test_a_patch_copies_brings_joins_and_fills_up() -> None:
    fine = nested(normal((2, 64)))
    part, low = coarse(fine), residual(fine)
    high, scale = part.parts["codes"].tobytes(), part.parts["scale"].tobytes()
    base = b"head" + high + scale
    steps = [
        Step("copy", 0, start=0, length=4),
        Step("join", 16, start=4, data=low.tobytes(), length=len(high)),
        Step("down", 16 + 2 * len(high), start=4 + len(high), length=len(scale)),
        Step("data", 6, data=b"new", length=3),
    ]
    size = 16 + 2 * len(high) + len(scale) + 5

    made = b"".join(patched(io.BytesIO(packed_patch(steps, size)), io.BytesIO(base)))

    codes, own = fine.parts["codes"].tobytes(), fine.parts["scale"].tobytes()
    assert made == b"head\0\0new" + bytes(7) + codes + own + bytes(5)


def test_a_patch_goes_down_without_data() -> None:
    fine = nested(normal((2, 64)))
    part = coarse(fine)
    base = fine.parts["codes"].tobytes() + fine.parts["scale"].tobytes()
    codes, scale = part.parts["codes"].tobytes(), part.parts["scale"].tobytes()
    steps = [
        Step("cut", 0, start=0, length=len(codes)),
        Step("up", len(codes), start=2 * len(codes), length=len(scale)),
    ]
    patch = packed_patch(steps, len(codes) + len(scale))

    made = b"".join(patched(io.BytesIO(patch), io.BytesIO(base)))

    assert made == codes + scale
    assert len(patch) < 100


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (b"", "ends 8 bytes early"),
        ((1 << 40).to_bytes(8, "little"), "exceeds"),
        ((4).to_bytes(8, "little") + b"nope", "not a patch"),
        (packed_patch([Step("jump", 0, length=1)], 1), "operation 'jump' is unknown"),
        (packed_patch([Step("copy", 0, start=3, length=9)], 9), "ends 9 bytes early"),
        (packed_patch([Step("copy", 0, length=3)], 2), "make 3 bytes of a target of 2"),
        (packed_patch([Step("copy", 0, length=2), Step("copy", 1, length=1)], 3), "lies before"),
        (packed_patch([Step("copy", -1, length=2)], 3), "negative number"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(patch: bytes, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        b"".join(patched(io.BytesIO(patch), io.BytesIO(b"abc")))
