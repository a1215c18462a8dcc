# SPDX-License-Identifier: Apache-2.0
"""Calibrated int4 keeps the output where inputs are correlated, and is plain int4 where not."""

from __future__ import annotations

import numpy as np
import pytest

from lorikit.quantization import QuantizationError, codec
from lorikit.quantization.gptq import calibrated


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def correlated(count: int, columns: int) -> np.ndarray:
    """Inputs with a few strong directions, as activations have."""
    strong = normal(count, 12) * np.geomspace(8, 1, 12, dtype=np.float32)
    return strong @ normal(12, columns) + normal(count, columns, seed=1)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", [(48, 256), (7, 100), (5, 33), (3, 1)])
def test_without_correlations_it_is_plain_int4(block: int, shape: tuple[int, int]) -> None:
    weights = normal(*shape)
    encoded = calibrated(weights, np.eye(shape[1]), block=block)
    expected = codec(f"int4-row{block}").encode(weights)

    assert (encoded.codec, encoded.shape) == (expected.codec, expected.shape)
    np.testing.assert_array_equal(encoded.parts["scale"], expected.parts["scale"])
    np.testing.assert_array_equal(encoded.parts["codes"], expected.parts["codes"])


@pytest.mark.parametrize("block", [32, 64, 128])
def test_output_error_falls_where_inputs_are_correlated(block: int) -> None:
    weights, inputs = normal(96, 384), correlated(2000, 384)
    fresh = correlated(2500, 384)[2000:]  # of the same directions, not calibrated with

    def error(encoded) -> float:
        decoded = codec(encoded.codec).decode(encoded)
        return float(np.square(fresh @ (decoded - weights).T).sum())

    plain = error(codec(f"int4-row{block}").encode(weights))
    better = error(calibrated(weights, inputs.T @ inputs, block=block))
    assert better < 0.25 * plain


def test_scale_of_the_moments_does_not_matter() -> None:
    weights, inputs = normal(16, 128), correlated(500, 128)
    moments = inputs.T.astype(np.float64) @ inputs
    first, second = (calibrated(weights, moments * scale) for scale in (1, 4.0**10))
    np.testing.assert_array_equal(first.parts["codes"], second.parts["codes"])


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weights = normal(16, 128)
    inputs = correlated(500, 128)
    inputs[:, 40:60] = 0
    encoded = calibrated(weights, inputs.T @ inputs)
    decoded = codec("int4-row64").decode(encoded)
    np.testing.assert_allclose(decoded[:, 40:60], weights[:, 40:60], atol=0.4)
    assert np.isfinite(calibrated(weights, np.zeros((128, 128))).parts["scale"]).all()


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (np.eye(7), r"must be finite and \(8, 8\), got \(7, 7\)"),
        (np.full((8, 8), np.nan), "must be finite"),
        (np.diag([-1.0] + [1.0] * 7), "not positive semidefinite"),
    ],
)
def test_moments_that_are_none_are_refused(moments: np.ndarray, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        calibrated(normal(4, 8), moments)


def test_damping_must_be_positive() -> None:
    with pytest.raises(QuantizationError, match="damping must be above 0, got 0"):
        calibrated(normal(4, 8), np.eye(8), damping=0.0)
