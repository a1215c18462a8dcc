# SPDX-License-Identifier: Apache-2.0
"""LoRA that starts as the principal part of the frozen weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.product import Thin
from lorikit.server.aggregate.split import split
from lorikit.server.methods.base import AdapterSpace


def principal_start(
    space: AdapterSpace, weights: Mapping[str, Float32], *, scale: float
) -> Tensors:
    """A0 and B0 of every module: what ``FRLoRA.start`` wants of its ``initial``.

    Args:
        space: The model's adapter tensors.
        weights: Frozen weight by LoRA module, [d_out, d_in]; of a quantised base, as it computes.
        scale: LoRA scale s.

    Returns:
        LoRA tensors at the run's largest rank, ``s B0 A0`` the best approximation of the weight,
        ranks ordered by singular value.
    """
    pairs: Tensors = {}
    for a, b in space.pairs():
        left, values, right = np.linalg.svd(
            weights[a.module].astype(np.float64), full_matrices=False
        )
        thin = Thin(left, values, right)
        pairs[a.name], pairs[b.name] = split(thin, space.max_rank, scale=scale, mode="sqrt")
    return pairs
