# SPDX-License-Identifier: Apache-2.0
"""How much the loss hangs on each tensor of an adapter, measured on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.quantization import codec

_PROBE = codec("int2")
"""Coarse enough to be felt."""

_FLOOR = 1e-3
"""Least weight, of the largest: a small sample may see no effect where there is one."""


def sensitivities(
    loss: Callable[[Tensors], float], adapter: Tensors, names: Iterable[str]
) -> dict[str, float]:
    """Weight of a squared error in each tensor: what rounding it to 2 bits costs.

    One tensor is rounded at a time. A tensor that is zero, or whose rounding costs nothing, gets
    the floor, so that every tensor keeps a claim to bits. Weights are costs per squared error, the
    largest being 1.

    Args:
        loss: Mean loss of an adapter on a sample.
        adapter: The aggregate.
        names: Matrices to measure.

    Source:
        Dong et al. 2019, "HAWQ: Hessian AWare Quantization of Neural Networks with
        Mixed-Precision", https://arxiv.org/abs/1905.03696, with a measured difference in place of
        the Hessian's eigenvalue.
    """
    start = loss(adapter)
    found = {}
    for name in names:
        rounded = _PROBE.decode(_PROBE.encode(adapter[name]))
        error = float(np.square((rounded - adapter[name]).astype(np.float64)).sum())
        cost = loss({**adapter, name: rounded}) - start if error else 0.0
        found[name] = max(cost, 0.0) / error if error else 0.0
    largest = max(found.values(), default=0.0)
    if not largest:
        return dict.fromkeys(found, 1.0)
    return {name: max(weight / largest, _FLOOR) for name, weight in found.items()}
