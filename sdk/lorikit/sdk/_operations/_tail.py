# SPDX-License-Identifier: Apache-2.0
"""The tail of a LoRA adapter: the rank indices that HETLORA may drop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.sdk._operations.base import Pair


def check_tail_arguments(keep: float, min_rank: int) -> None:
    """Raise ``ValueError`` for a share outside (0, 1] or a rank below 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
    if min_rank < 1:
        raise ValueError(f"min_rank must be at least 1, got {min_rank}")


def common_rank(adapter: Tensors, pairs: Sequence[Pair]) -> int:
    """The one rank of all modules.

    Raises:
        ValueError: There is no LoRA module, or their ranks differ.
    """
    ranks = {int(adapter[a].shape[0]) for a, _ in pairs}
    if len(ranks) != 1:
        raise ValueError(f"the tail needs one rank common to all modules, found {sorted(ranks)}")
    return ranks.pop()


def tail_start(rank: int, keep: float) -> int:
    """First rank index of the tail, floor(keep * rank).

    A product that misses a whole number by rounding alone counts as that number
    (0.29 * 100 is 28.999999999999996).
    """
    return math.floor(keep * rank + 1e-9)


def tail_score(adapter: Tensors, pairs: Sequence[Pair], start: int) -> float:
    """Sum over modules of ||B[:, start:]||_F * ||A[start:, :]||_F."""
    return math.fsum(
        float(
            np.linalg.norm(adapter[b][:, start:].astype(np.float64))
            * np.linalg.norm(adapter[a][start:].astype(np.float64))
        )
        for a, b in pairs
    )
