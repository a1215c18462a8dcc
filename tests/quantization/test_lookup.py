# SPDX-License-Identifier: Apache-2.0
"""Finding codecs by name, converting between them, measuring their error."""

from __future__ import annotations

import math

import numpy as np
import pytest

import lorikit.quantization
from lorikit.proto.tensors import raw
from lorikit.quantization import (
    CODECS,
    ErrorMetrics,
    QuantizationError,
    codec,
    convert,
    error_metrics,
)
from lorikit.quantization.base import Float32


def normal(*shape: int) -> Float32:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_public_names_are_sorted_and_exist() -> None:
    names = lorikit.quantization.__all__
    assert names == sorted(names)
    assert all(hasattr(lorikit.quantization, name) for name in names)


def test_codec_is_found_by_its_name() -> None:
    assert all(codec(name).name == name for name in CODECS)
    assert {"fp32", "fp16", "int8", "nf4", "int4", "int8-block64"} <= set(CODECS)


def test_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(QuantizationError, match=r"unknown codec 'int5'.*fp32, .*nf4"):
        codec("int5")


@pytest.mark.parametrize("to_name", CODECS)
@pytest.mark.parametrize("from_name", CODECS)
def test_conversion_encodes_what_the_first_codec_decodes(from_name: str, to_name: str) -> None:
    source = codec(from_name).encode(normal(5, 70))
    result = convert(source, to_name)
    expected = codec(to_name).encode(codec(from_name).decode(source))
    if from_name == to_name:
        expected = source
    assert (result.codec, result.shape) == (to_name, (5, 70))
    for role, part in result.parts.items():
        np.testing.assert_array_equal(part, expected.parts[role])


def test_conversion_rounds_stochastically_where_it_can() -> None:
    drawn = convert(raw(normal(5, 70)), "int4", rng=np.random.default_rng(1))
    direct = codec("int4").encode(normal(5, 70), rng=np.random.default_rng(1))
    np.testing.assert_array_equal(drawn.parts["codes"], direct.parts["codes"])


def test_errors_of_a_small_tensor() -> None:
    metrics = error_metrics([3.0, -4.0, 0.0], [3.0, -4.5, 0.0])
    # squared error 0.25, squared values 9 + 16
    assert metrics.relative_mse == pytest.approx(0.01)
    assert metrics.sqnr_db == pytest.approx(20.0)
    assert metrics.max_abs_error == 0.5


def test_errors_at_the_limits() -> None:
    exact = ErrorMetrics(relative_mse=0.0, sqnr_db=math.inf, max_abs_error=0.0)
    assert error_metrics([1.0, 2.0], [1.0, 2.0]) == exact
    assert error_metrics(np.zeros(3), np.zeros(3)) == exact
    assert error_metrics(np.zeros((0, 4)), np.zeros((0, 4))) == exact
    lost = ErrorMetrics(relative_mse=math.inf, sqnr_db=-math.inf, max_abs_error=1.0)
    assert error_metrics([0.0], [1.0]) == lost


def test_errors_of_other_shapes_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"shape \(2,\) with shape \(1, 2\)"):
        error_metrics(np.zeros(2), np.zeros((1, 2)))


def test_more_bits_give_less_error() -> None:
    values = normal(64, 256)
    by_bits = ["int4-row128", "int4-row64", "int4-row32", "int8", "bf16", "fp16", "fp32"]
    quality = [
        error_metrics(values, codec(name).decode(codec(name).encode(values))).sqnr_db
        for name in by_bits
    ]
    assert quality == sorted(quality)


def test_nf4_beats_fp4_on_normal_weights() -> None:
    values = normal(64, 256)
    nf4, fp4 = (
        error_metrics(values, codec(name).decode(codec(name).encode(values))).relative_mse
        for name in ("nf4", "fp4")
    )
    assert nf4 < fp4
