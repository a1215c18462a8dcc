# SPDX-License-Identifier: Apache-2.0
"""HETLORA's penalty on the tail ranks, as a gradient operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorikit.proto.tensors import Float32, Tensors
from lorikit.sdk._operations._tail import check_tail_arguments, common_rank, tail_start
from lorikit.sdk._operations.base import Pair

_EPSILON = 1e-12
"""Inside both square roots: the product of norms has no gradient where the tail is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPenalty:
    """Adds lambda * sum_m ||B[:, q:]||_F * ||A[q:, :]||_F with q = floor(gamma r) to the loss.

    Nothing is added at or below ``min_rank``, where the tail cannot be dropped.

    Source:
        Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
        Models", https://arxiv.org/abs/2401.06432, section on rank self-pruning. The offset inside
        the square roots is ours.
    """

    weight: float
    """Lambda; at least 0."""
    keep: float
    """Gamma, where the tail starts; in (0, 1]."""
    min_rank: int

    def __post_init__(self) -> None:
        check_tail_arguments(self.keep, self.min_rank)
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight must be finite and at least 0, got {self.weight}")

    def check(self, adapter: Tensors, pairs: Sequence[Pair]) -> None:
        """Raise ``ValueError`` unless all modules have one rank."""
        common_rank(adapter, pairs)

    def term(self, adapter: Tensors, pairs: Sequence[Pair]) -> tuple[float, Tensors]:
        """The penalty, and its gradient for A and B of every module."""
        rank = common_rank(adapter, pairs)
        start = tail_start(rank, self.keep)
        if rank <= self.min_rank or start == rank or self.weight == 0:
            return 0.0, {}
        total = 0.0
        gradients: Tensors = {}
        for a_name, b_name in pairs:
            a, b = adapter[a_name], adapter[b_name]
            a_norm, b_norm = _smooth_norm(a[start:]), _smooth_norm(b[:, start:])
            total += a_norm * b_norm
            gradients[a_name], gradients[b_name] = np.zeros_like(a), np.zeros_like(b)
            gradients[a_name][start:] = a[start:] * np.float32(self.weight * b_norm / a_norm)
            gradients[b_name][:, start:] = b[:, start:] * np.float32(self.weight * a_norm / b_norm)
        return self.weight * total, gradients


def _smooth_norm(values: Float32) -> float:
    return math.sqrt(float(np.sum(np.square(values, dtype=np.float64))) + _EPSILON)
