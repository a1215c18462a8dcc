# SPDX-License-Identifier: Apache-2.0
"""HETLORA's self-pruning: a device gives up ranks that its data does not need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.sdk._operations._tail import (
    check_tail_arguments,
    common_rank,
    tail_score,
    tail_start,
)
from lorikit.sdk._operations.base import Pair, Result, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneTail:
    """Drops the tail of every module if its score is strictly lower than before training.

    One decision for all modules, so that they keep one common rank.

    Source:
        Cho et al. 2024, https://arxiv.org/abs/2401.06432, section on rank self-pruning.
    """

    keep: float
    """Gamma, where the tail starts; 1 switches pruning off."""
    min_rank: int
    """Lowest rank that pruning leaves."""

    def __post_init__(self) -> None:
        check_tail_arguments(self.keep, self.min_rank)

    def check(self, adapter: Tensors, pairs: Sequence[Pair]) -> None:
        """Raise ``ValueError`` unless all modules have one rank."""
        common_rank(adapter, pairs)

    def produces(self) -> tuple[str, ...]:
        """Nothing beside the adapter."""
        return ()

    def run(self, work: Work) -> Result:
        """The adapter, cut to max(min_rank, floor(keep * rank)) where the score fell."""
        rank = common_rank(work.adapter, work.pairs)
        start = tail_start(rank, self.keep)
        kept = max(self.min_rank, start)
        if kept >= rank:
            return Result(adapter=work.adapter)
        before = tail_score(work.received, work.pairs, start)
        if not tail_score(work.adapter, work.pairs, start) < before:
            return Result(adapter=work.adapter)
        return Result(adapter=_cut(work.adapter, work.pairs, kept))


def _cut(adapter: Tensors, pairs: Sequence[Pair], rank: int) -> Tensors:
    cut = dict(adapter)
    for a, b in pairs:
        cut[a] = np.ascontiguousarray(adapter[a][:rank])
        cut[b] = np.ascontiguousarray(adapter[b][:, :rank])
    return cut
