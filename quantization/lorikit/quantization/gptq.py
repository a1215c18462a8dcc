# SPDX-License-Identifier: Apache-2.0
"""Calibrated int4: rounds column by column, each correcting what those before did to the output."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Encoded
from lorikit.quantization._checks import finite
from lorikit.quantization._rounding import padded_blocks
from lorikit.quantization.base import Float32, QuantizationError
from lorikit.quantization.int4 import Int4Rows, packed, steps

Float64 = npt.NDArray[np.float64]


def calibrated(
    weights: Float32, second_moments: npt.ArrayLike, *, block: int = 64, damping: float = 0.01
) -> Encoded:
    """The weights in the codec ``int4-row{block}`` with a small error of ``inputs @ weights.T``.

    Columns are rounded from left to right; the error of each is made up for by the columns that are
    still to come, as the inputs' correlations say. Where inputs are not correlated the result is
    that of ``Int4Rows.encode``, and it is read like it.

    Args:
        weights: Float32 [outputs, columns].
        second_moments: ``inputs.T @ inputs`` over a calibration set, [columns, columns]; any scale.
        block: Values that share a scale; 32, 64 or 128.
        damping: What is added to the moments' diagonal, as a share of its mean; above zero.

    Raises:
        QuantizationError: Values that are not finite, shapes that do not fit, or moments that are
            no second moments.

    Source:
        Frantar et al. 2023, "GPTQ", https://arxiv.org/abs/2210.17323, algorithm 1, without
        reordering; the step of a block is chosen when its first column is reached.
    """
    array = finite(weights)
    rows, columns = array.shape
    factor = _factor(second_moments, columns, damping)
    left = array.astype(np.float64)
    count = -(-columns // block)
    codes = np.zeros((rows, count, block), np.int8)
    scale = np.empty((rows, count), np.float32)
    for place in range(count):
        start, stop = place * block, min((place + 1) * block, columns)
        group = np.ascontiguousarray(left[:, start:stop], np.float32)
        scale[:, place] = steps(padded_blocks(group, block), is_stochastic=False)[:, 0]
        errors = np.empty((rows, stop - start))
        for column in range(start, stop):
            step = scale[:, place].astype(np.float64)
            code = np.clip(np.rint(left[:, column] / step), -8, 7)
            codes[:, place, column - start] = code
            error = (left[:, column] - code * step) / factor[column, column]
            left[:, column:stop] -= np.outer(error, factor[column, column:stop])
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return Encoded(Int4Rows(block).name, array.shape, {"codes": packed(codes), "scale": scale})


def _factor(second_moments: npt.ArrayLike, columns: int, damping: float) -> Float64:
    """Upper Cholesky factor of the inverse of the damped moments, [columns, columns]."""
    moments = np.array(second_moments, np.float64)
    if moments.shape != (columns, columns) or not np.isfinite(moments).all():
        raise QuantizationError(
            f"second moments must be finite and ({columns}, {columns}), got {moments.shape}"
        )
    if not damping > 0:
        raise QuantizationError(f"damping must be above 0, got {damping}")
    diagonal = np.diagonal(moments)
    mean = float(diagonal.mean()) if columns else 0.0
    moments[np.diag_indices(columns)] += damping * (mean or 1.0)
    try:
        np.linalg.cholesky(moments)  # fails where the moments are none
        inverse = np.linalg.inv(moments)
        factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    except np.linalg.LinAlgError as error:
        raise QuantizationError("second moments are not positive semidefinite") from error
    return np.asarray(factor, np.float64)
