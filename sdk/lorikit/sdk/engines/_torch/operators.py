# SPDX-License-Identifier: Apache-2.0
"""All operators by domain and name."""

from __future__ import annotations

from collections.abc import Mapping

from lorikit.sdk.engines._torch import elementwise, layers, products, shapes
from lorikit.sdk.engines._torch.base import Operator

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's contrib operators."""

OPERATORS: Mapping[tuple[str, str], Operator] = {
    **{
        ("", name): operator
        for table in (elementwise, layers, products, shapes)
        for name, operator in table.OPERATORS.items()
    },
    **{
        (MICROSOFT, name): operator
        for table in (elementwise, layers, products)
        for name, operator in table.CONTRIB.items()
    },
}

READS_NUMBERS: Mapping[str, frozenset[int]] = {
    "ConstantOfShape": frozenset({0}),
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "OneHot": frozenset({1, 2}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "ReduceL1": frozenset({1}),
    "ReduceL2": frozenset({1}),
    "ReduceLogSumExp": frozenset({1}),
    "ReduceMax": frozenset({1}),
    "ReduceMean": frozenset({1}),
    "ReduceMin": frozenset({1}),
    "ReduceProd": frozenset({1}),
    "ReduceSum": frozenset({1}),
    "ReduceSumSquare": frozenset({1}),
    "Reshape": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Trilu": frozenset({1}),
    "Unsqueeze": frozenset({1}),
}
"""Positions of inputs that say how to compute; they are read on the host and best stay there."""
