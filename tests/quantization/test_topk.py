# SPDX-License-Identifier: Apache-2.0
"""The largest magnitudes come back at their places; gaps that lie are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lorikit.proto.tensors import Encoded
from lorikit.quantization import QuantizationError, codec
from lorikit.quantization.topk import TopK


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 64, 1000, 70_001])
def test_the_largest_come_back_and_the_rest_is_zero(count: int, share: float) -> None:
    values = normal(count)
    decoded = codec("topk").decode(TopK(share).encode(values))

    kept = int(np.ceil(share * count))
    places = np.sort(np.argsort(-np.abs(values))[:kept])
    expected = np.zeros(count, np.float32)
    expected[places] = values[places]
    assert np.all(decoded[expected == 0] == 0)
    assert np.abs(decoded - expected).max() <= np.abs(values).max() / 253


def test_gaps_of_every_width_come_back() -> None:
    gaps = [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152]
    places = np.cumsum(np.array(gaps) + 1) - 1
    values = np.zeros(places[-1] + 100, np.float32)
    values[places] = 1
    encoded = TopK(len(gaps) / values.size).encode(values)

    np.testing.assert_array_equal(np.flatnonzero(codec("topk").decode(encoded)), places)
    assert encoded.parts["gaps"].size == 1 + 1 + 1 + 2 + 2 + 3 + 3 + 4


def test_bytes_follow_from_the_gaps() -> None:
    values = np.zeros(6400, np.float32)
    values[::100] = 3
    # 64 values of one byte, one scale of two, 64 gaps of one byte
    assert TopK(0.01).encode(values).nbytes == 64 + 2 + 64


def test_among_equal_magnitudes_the_first_stay() -> None:
    decoded = codec("topk").decode(TopK(0.25).encode(np.array([1, -2, 2, 2, 1, -2, 0, 0.0])))
    # the step has 8 significant bits
    np.testing.assert_allclose(decoded, [0, -2, 2, 0, 0, 0, 0, 0], rtol=2**-8)


@pytest.mark.parametrize(
    ("gaps", "message"),
    [
        ([], "0 gaps for 2 values"),
        ([0], "1 gaps for 2 values"),
        ([0, 0, 0], "3 gaps for 2 values"),
        ([0, 128], "1 gaps for 2 values"),
        ([0, 9], r"lead to 10 in a tensor of 10"),
        ([10, 0], "a gap of 10 leaves"),
        ([0, *[255] * 6, 0], "more than 6 bytes"),
        ([0, *[255] * 5, 127], "a gap of 4398046511103 leaves"),
    ],
)
def test_gaps_that_do_not_fit_are_refused(gaps: list[int], message: str) -> None:
    parts = {
        "gaps": np.array(gaps, np.uint8),
        "codes": np.array([1, 2], np.int8),
        "scale": np.array([0x3F80], np.uint16),
    }
    with pytest.raises(QuantizationError, match=message):
        codec("topk").decode(Encoded("topk", (10,), parts))


def test_tensor_without_elements_comes_back() -> None:
    encoded = TopK(0.5).encode(np.zeros((3, 0), np.float32))
    assert encoded.nbytes == 0
    assert codec("topk").decode(encoded).shape == (3, 0)
    parts = {**encoded.parts, "gaps": np.zeros(1, np.uint8)}
    with pytest.raises(QuantizationError, match="gaps"):
        codec("topk").decode(dataclasses.replace(encoded, parts=parts))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(QuantizationError, match="share must lie in"):
        TopK(share)
