# SPDX-License-Identifier: Apache-2.0
"""How far a decoded tensor is from the original."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.quantization.base import QuantizationError


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorMetrics:
    """Error of one tensor."""

    relative_mse: float
    """Sum of squared errors over sum of squares; zero if exact, infinite if only the original is
    all zero."""
    sqnr_db: float
    """Signal to quantisation noise, -10 log10(relative_mse), in dB; infinite if exact."""
    max_abs_error: float
    """Largest magnitude of an error, in units of the weights."""


def error_metrics(values: npt.ArrayLike, decoded: npt.ArrayLike) -> ErrorMetrics:
    """Compare a tensor with what its code decodes to; sums run in float64.

    Raises:
        QuantizationError: The shapes differ.
    """
    original = np.asarray(values, np.float64)
    approximation = np.asarray(decoded, np.float64)
    if original.shape != approximation.shape:
        raise QuantizationError(
            f"cannot compare shape {original.shape} with shape {approximation.shape}"
        )
    error = (approximation - original).reshape(-1)
    signal, noise = float(np.square(original).sum()), float(error @ error)
    return from_sums(signal, noise, float(np.abs(error).max(initial=0.0)))


def from_sums(signal: float, noise: float, max_abs_error: float) -> ErrorMetrics:
    """Errors of what was compared piece by piece.

    Args:
        signal: Sum of squares of the original.
        noise: Sum of squared errors.
        max_abs_error: Largest magnitude of an error.
    """
    return ErrorMetrics(
        relative_mse=_ratio(noise, signal),
        sqnr_db=10 * math.log10(_ratio(signal, noise)) if signal and noise else _limit(noise),
        max_abs_error=max_abs_error,
    )


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return numerator / denominator


def _limit(noise: float) -> float:
    return math.inf if noise == 0 else -math.inf
