# SPDX-License-Identifier: Apache-2.0
"""What every kind of data gives: how many labels a draw counts, and its batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lorikit.sdk._errors import PlanRefusedError
from lorikit.sdk.engines.base import Batch

Indices = npt.NDArray[np.int64]


class Dataset(ABC):
    """Local examples of one task.

    A *draw* is the number of an example plus epoch times the number of examples: of ten examples,
    example 3 is drawn as 3, then as 13, then as 23. What is random in a batch, such as masks,
    depends on seed and draw alone.
    """

    max_length: int
    """At most so many tokens are in an example; 0 where examples have none."""
    lengths: Indices
    """Tokens per example, [examples]; 1 where examples have none."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def labels(self) -> Indices:
        """Class per example, [examples].

        Raises:
            PlanRefusedError: Examples of this task have no class of their own.
        """
        raise PlanRefusedError("the plan needs a class per example; this task labels tokens")

    @abstractmethod
    def counted(self, draws: npt.ArrayLike) -> Indices:
        """How many labels each drawn example has, [draws]; at least 1 each."""

    @abstractmethod
    def batch(
        self, draws: npt.ArrayLike, weights: npt.ArrayLike = 1.0, *, seed: Sequence[int] = (0,)
    ) -> Batch:
        """The drawn examples as one batch, padded to the longest.

        Args:
            draws: Which examples, in which epoch, [batch].
            weights: Weight of each counted label's loss: a number, or [batch] by example. Labels
                that do not count get weight 0.
            seed: Of what is random in a batch.
        """

    def grouped(self, draws: npt.ArrayLike, group_size: int) -> Iterator[Indices]:
        """Cut draws into groups of similar length, the longest first.

        The longest come first because the runtime's arena then grows once and later groups fit
        in. Equal lengths keep their order, so the result depends on the arguments alone.

        Args:
            draws: In any order, [draws].
            group_size: Most examples in a group.
        """
        every = np.asarray(draws, np.int64)
        order = every[np.argsort(-self.lengths[every % max(len(self), 1)], kind="stable")]
        for start in range(0, len(order), group_size):
            yield order[start : start + group_size]

    def batches(
        self, batch_size: int, indices: npt.ArrayLike | None = None
    ) -> Iterator[tuple[Indices, Batch]]:
        """Every example once, the longest first, with little padding.

        Args:
            batch_size: Examples in a batch; the last may have fewer.
            indices: Only these examples; None for all.

        Yields:
            The numbers of the examples, and the batch; every weight is 1 / number of labels.
        """
        every = np.arange(len(self)) if indices is None else np.asarray(indices, np.int64)
        if not len(every):
            return
        total = self.counted(every).sum()
        for chosen in self.grouped(every, batch_size):
            yield chosen, self.batch(chosen, 1 / total)


def by_token(weights: npt.ArrayLike, counts: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """The weight of an example at each of its tokens that counts, 0 elsewhere, [batch, length]."""
    column = np.broadcast_to(np.asarray(weights, np.float32), counts.shape[:1])[:, None]
    return np.where(counts, column, np.float32(0))
