# SPDX-License-Identifier: Apache-2.0
"""Optimiser states in 8 bits: their levels, their error, and training with them."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from lorikit.proto.plan import OptimizerConfig
from lorikit.sdk._optimizer import initial_slots, mean_squared_gradients, updated
from lorikit.sdk._snapshot import Snapshot, from_journal, to_journal
from lorikit.sdk._states import BLOCK, SMALLEST, dequantized, levels, quantized

EIGHT = OptimizerConfig(state_bits=8)


@pytest.mark.parametrize("is_signed", [True, False])
def test_levels_are_those_of_bitsandbytes(is_signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the reference's levels")
    expected = functional.create_dynamic_map(signed=is_signed).numpy()
    np.testing.assert_allclose(levels(is_signed=is_signed), expected, rtol=1e-6)


def test_codes_of_a_block_by_hand() -> None:
    # The scale is the largest element with its sign, -2; divided by it the block is 1, -0.5, 0.
    codes, scales = quantized(np.array([-2.0, 1.0, 0.0], np.float32), is_signed=True)
    table = levels(is_signed=True)

    assert scales.tolist() == [-2.0]
    nearest = [int(np.abs(table - value).argmin()) for value in (1.0, -0.5, 0.0)]
    assert codes.tolist() == nearest
    # The uppermost decade has 64 steps from 0.1 to 1, so a value is at most half a step off.
    values = dequantized(codes, scales, is_signed=True)
    np.testing.assert_allclose(values, [-2, 1, 0], atol=2 * 0.9 / 64 / 2)


@pytest.mark.parametrize("is_signed", [True, False])
def test_blocks_of_one_lose_nothing(is_signed: bool, rng: np.random.Generator) -> None:
    values = rng.standard_normal((5, 7), dtype=np.float32)
    values = values if is_signed else np.abs(values)
    codes, scales = quantized(values, is_signed=is_signed, block=1)
    np.testing.assert_array_equal(dequantized(codes, scales, is_signed=is_signed, block=1), values)


def test_smaller_blocks_lose_less(rng: np.random.Generator) -> None:
    # Magnitudes over many decades, as second moments are.
    values = np.exp(rng.normal(0, 4, 8192)).astype(np.float32)
    errors = []
    for block in (4096, 256, 16, 1):
        codes, scales = quantized(values, is_signed=False, block=block)
        back = dequantized(codes, scales, is_signed=False, block=block)
        errors.append(float(np.abs(back / values - 1).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_zeros_stay_zeros() -> None:
    codes, scales = quantized(np.zeros(300, np.float32), is_signed=True)
    np.testing.assert_array_equal(dequantized(codes, scales, is_signed=True), np.zeros(300))


def test_second_moment_above_zero_never_becomes_zero() -> None:
    values = np.array([1.0, 1e-12, 0.0], np.float32)
    back = dequantized(*quantized(values, is_signed=False), is_signed=False)
    # The smallest level above zero: the middle of the lowest decade's first half, times 1e-6.
    np.testing.assert_allclose(back, [1.0, 0.325e-6, 0.0], rtol=1e-6)


def test_states_take_a_quarter_of_the_memory() -> None:
    parameter = np.zeros((64, 128), np.float32)
    slots = initial_slots(EIGHT, parameter)
    # Two moments, a byte each, and a float32 scale per block of 256 for each.
    assert sum(array.nbytes for array in slots.values()) == 2 * (8192 + 8192 // BLOCK * 4)
    whole = initial_slots(OptimizerConfig(), parameter)
    assert sum(array.nbytes for array in whole.values()) == 2 * 8192 * 4


def test_small_tensors_keep_their_precision() -> None:
    slots = initial_slots(EIGHT, np.zeros(SMALLEST - 1, np.float32))
    assert {role: array.dtype.name for role, array in slots.items()} == {
        "first": "float32", "second": "float32",
    }  # fmt: skip


def test_first_step_equals_that_of_32_bits(rng: np.random.Generator) -> None:
    value, gradient = rng.standard_normal((2, 8192), dtype=np.float32)
    moved = [
        updated(value, gradient, initial_slots(config, value), config, learning_rate=0.1, step=0)[0]
        for config in (EIGHT, OptimizerConfig())
    ]
    np.testing.assert_array_equal(*moved)


def test_state_comes_back_from_the_journal_bit_for_bit(rng: np.random.Generator) -> None:
    value, gradient = rng.standard_normal((2, 8192), dtype=np.float32)
    _, slots = updated(
        value, gradient, initial_slots(EIGHT, value), EIGHT, learning_rate=0.1, step=0
    )
    snapshot = Snapshot(adapter={"w": value}, slots={"w": slots})

    back = from_journal(*to_journal(snapshot, "x"), "x")

    assert back is not None
    assert back.slots["w"].keys() == slots.keys()
    for role, array in slots.items():
        assert back.slots["w"][role].dtype == array.dtype
        np.testing.assert_array_equal(back.slots["w"][role], array)
    squared = float(np.mean(np.square(gradient, dtype=np.float64)))
    assert mean_squared_gradients(back.slots)["w"] == pytest.approx(0.001 * squared, rel=0.02)


def _clinc(rows: int, features: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Bags of hashed words of real sentences, and their classes."""
    pytest.importorskip("lorikit.server.demo", reason="the sentences come with lorikit[server]")
    import lorikit.server.demo as demo

    folder = Path(demo.__path__[0]) / "clinc150"
    with gzip.open(folder / "train.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file][:rows]
    classes = sorted({line["intent"] for line in lines})
    bags = np.zeros((len(lines), features), np.float32)
    for row, line in enumerate(lines):
        for word in line["text"].split():
            bags[row, zlib.crc32(word.encode()) % features] += 1
    return bags, np.array([classes.index(line["intent"]) for line in lines]), len(classes)


def _losses(config: OptimizerConfig, seed: int) -> np.ndarray:
    """Loss of each of 150 steps of softmax regression on CLINC150 in batches of 64."""
    bags, classes, count = _clinc(3000, 512)
    rng = np.random.default_rng(seed)
    weight = np.zeros((count, 512), np.float32)
    slots, losses = initial_slots(config, weight), []
    for step in range(150):
        chosen = rng.integers(0, len(bags), 64)
        logits = bags[chosen] @ weight.T
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        p = shifted / shifted.sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(64), classes[chosen]]).mean())
        p[np.arange(64), classes[chosen]] -= 1
        gradient = (p.T @ bags[chosen] / 64).astype(np.float32)
        weight, slots = updated(
            weight, gradient, slots, config, learning_rate=config.learning_rate, step=step
        )
    return np.array(losses)


def test_loss_curve_on_real_text_is_that_of_32_bits_within_noise() -> None:
    whole = OptimizerConfig(learning_rate=0.02)
    eight = OptimizerConfig(learning_rate=0.02, state_bits=8)
    reference, ours = _losses(whole, 1), _losses(eight, 1)
    # Noise: how far another order of the same rows moves the curve.
    noise = np.abs(_losses(whole, 2) - reference).mean()
    assert np.abs(ours - reference).mean() < 0.1 * noise
    assert ours[-20:].mean() < 0.6 * ours[:20].mean()
