# SPDX-License-Identifier: Apache-2.0
"""Mean over holders: each entry is averaged over the devices that sent it.

One primitive serves every method that averages parameters: whole tensors (FedIT, LEGEND, FedRA),
leading blocks (HETLORA's slices, HeteroFL), masks (FedSelect, CELL) and rows (class rows of a
head).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Float32, Tensors

Float64 = npt.NDArray[np.float64]
Index = tuple[slice, ...] | npt.NDArray[np.bool_] | npt.NDArray[np.int64]
"""Which entries of the full tensor an upload holds.

A block (one slice per axis), a mask of the full shape (the upload lists the entries in C order), or
ids along the first axis, each at most once.
"""


class HolderMean:
    """A weighted mean per entry that takes one update at a time.

    Sums are kept in float64, so that the result does not depend on how many updates there are; it
    comes out in float32. Memory: one float64 copy of every tensor seen, and one of the weights of
    every tensor that was ever added in part.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Args are the full shapes by tensor name; other names are refused."""
        self._shapes = dict(shapes)
        self._sums: dict[str, Float64] = {}
        self._weights: dict[str, float | Float64] = {}

    def add(self, name: str, values: Float32, weight: float, *, index: Index | None = None) -> None:
        """Add one device's values of one tensor.

        Args:
            name: A name of ``shapes``.
            values: The full tensor, or its entries at ``index``.
            weight: Weight of the device; finite, at least 0.
            index: Entries that the device holds; None for all.

        Raises:
            ValueError: Unknown name, a shape that does not match, or a bad weight.
        """
        if name not in self._shapes:
            raise ValueError(f"{name}: not one of the tensors to average; check the update's names")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"{name}: weight must be finite and at least 0, got {weight}")
        total = self._sums.setdefault(name, np.zeros(self._shapes[name]))
        selected = total if index is None else total[_checked(name, index)]
        if values.shape != selected.shape:
            raise ValueError(f"{name}: shape {values.shape} does not fill {selected.shape}")
        product = weight * values.astype(np.float64)
        if index is None:
            total += product
        else:
            total[index] += product
        self._count(name, weight, index)

    def weight(self, name: str) -> float | Float64:
        """Sum of the weights of a tensor, per entry if parts of it were added; 0 for no holder."""
        return self._weights.get(name, 0.0)

    def finish(self, previous: Mapping[str, Float32]) -> Tensors:
        """The means; entries without a holder (or with holders of weight 0 only) stay as they were.

        Args:
            previous: Values before the round, of the full shapes, for every name of ``shapes``.

        Returns:
            Every tensor of ``shapes``, float32.
        """
        return {name: self._mean(name, previous[name]) for name in self._shapes}

    def _mean(self, name: str, previous: Float32) -> Float32:
        weight = np.broadcast_to(self.weight(name), self._shapes[name])
        if name not in self._sums or not weight.any():
            return previous
        mean = np.divide(self._sums[name], weight, where=weight > 0, out=np.zeros(weight.shape))
        return np.where(weight > 0, mean, previous).astype(np.float32)

    def _count(self, name: str, weight: float, index: Index | None) -> None:
        counted = self._weights.get(name, 0.0)
        if index is not None and not isinstance(counted, np.ndarray):
            counted = np.full(self._shapes[name], counted)
        if index is None:
            counted = counted + weight
        else:
            assert isinstance(counted, np.ndarray)
            counted[index] += weight
        self._weights[name] = counted


def _checked(name: str, index: Index) -> Index:
    repeats = (
        isinstance(index, np.ndarray)
        and index.dtype != np.bool_
        and np.unique(index).size != index.size
    )
    if repeats:
        raise ValueError(f"{name}: an id stands twice in the index; add each entry once")
    return index
