# SPDX-License-Identifier: Apache-2.0
"""Sums of features per class, from which a server starts a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import Indices
from lorikit.sdk._operations.base import Pair, Result, Work

SUMS = "statistics.class_sums"
COUNTS = "statistics.class_counts"
MOMENTS = "statistics.moments"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSums:
    """Sends the head's input features summed per class, and how many examples each class has.

    With ``second_moments`` it also sends the sum of f f^T over all its examples, [width, width].

    Privacy: the sums and counts are exact. They reveal which classes a device holds, and the
    features of an example that is alone in its class; a method that must hide them adds clipping
    and noise.
    """

    max_examples: int = 0
    """Most examples looked at, drawn with the plan's seed; 0 for all."""
    batch_size: int = 4
    """Examples per forward pass. Inference holds one layer at a time, so four examples take less
    memory than training on one."""
    second_moments: bool = False
    """Whether to send the sum of f f^T as well."""

    def __post_init__(self) -> None:
        if self.max_examples < 0:
            raise ValueError(f"max_examples must be at least 0, got {self.max_examples}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def check(self, adapter: Tensors, pairs: Sequence[Pair]) -> None:
        """Every adapter will do."""

    def produces(self) -> tuple[str, ...]:
        """Sums [classes, width] and counts [classes]; with second moments also [width, width]."""
        return (SUMS, COUNTS, MOMENTS) if self.second_moments else (SUMS, COUNTS)

    def run(self, work: Work) -> Result:
        """One pass over the local examples; sums are taken in float64."""
        chosen = self._chosen(len(work.data), work.seed)
        sums: npt.NDArray[np.float64] | None = None
        moments: npt.NDArray[np.float64] | None = None
        for indices, batch in work.data.batches(self.batch_size, chosen):
            work.check_cancelled()
            features = work.engine.predict(work.adapter, batch, work.inputs).features
            if sums is None or moments is None:
                sums = np.zeros((work.classes, features.shape[1]))
                moments = np.zeros((features.shape[1],) * (2 if self.second_moments else 1))
            precise = features.astype(np.float64)
            np.add.at(sums, work.data.labels[indices], precise)
            if self.second_moments:
                moments += precise.T @ precise
        counts = np.bincount(work.data.labels[chosen], minlength=work.classes)
        assert sums is not None, "the executor refuses an empty data set"
        assert moments is not None, "made with the sums"
        produced = {SUMS: sums.astype(np.float32), COUNTS: counts.astype(np.float32)}
        if self.second_moments:
            produced[MOMENTS] = moments.astype(np.float32)
        return Result(adapter=work.adapter, produced=produced)

    def _chosen(self, examples: int, seed: int) -> Indices:
        if not 0 < self.max_examples < examples:
            return np.arange(examples)
        drawn = np.random.default_rng(seed).permutation(examples)[: self.max_examples]
        return np.sort(drawn)
