# SPDX-License-Identifier: Apache-2.0
"""The exact mean products of a round, for methods that do more with them than average factors."""

from __future__ import annotations

from lorikit.proto.tensors import Tensors
from lorikit.server.aggregate.mean import HolderMean
from lorikit.server.aggregate.product import ProductMean, Thin
from lorikit.server.methods.adapters import (
    Weighting,
    device_weight,
    outside_pairs,
    sent_tensors,
)
from lorikit.server.methods.base import AdapterSpace, Contribution


class RoundProducts:
    """The mean of ``s_k B_k A_k`` per module, and of every tensor that is in no pair.

    Unlike a mean of factors this keeps the round's factors until the end: r_k (d_in + d_out)
    float32 values per device and module, at most twice min(d_in, d_out) ranks.
    """

    def __init__(self, space: AdapterSpace, adapter: Tensors, weighting: Weighting) -> None:
        """Args are the adapter tensors, their values before the round, and how devices count."""
        self._space = space
        self._adapter = adapter
        self._weighting = weighting
        self._products = {
            a.module: ProductMean(adapter[a.name].shape[1], adapter[b.name].shape[0])
            for a, b in space.pairs()
        }
        self._rest = HolderMean({name: adapter[name].shape for name in outside_pairs(space)})

    def add(self, contribution: Contribution) -> int:
        """Add one update; returns the largest rank it came with."""
        weight = device_weight(contribution, self._weighting)
        sent = sent_tensors(self._space, contribution)
        for name in outside_pairs(self._space):
            if name in sent:
                self._rest.add(name, sent[name], weight)
        rank = 0
        for a, b in self._space.pairs():
            if a.name in sent and b.name in sent:
                scale = contribution.assignment.scale
                product = self._products[a.module]
                product.add(sent[a.name], sent[b.name], scale=scale, weight=weight)
                rank = max(rank, sent[a.name].shape[0])
        return rank or max(contribution.assignment.ranks.values())

    def means(self) -> dict[str, Thin]:
        """Mean product by module, for the modules that somebody trained."""
        return {
            module: product.finish()
            for module, product in self._products.items()
            if product.weight > 0
        }

    def rest(self) -> Tensors:
        """Everything outside the pairs; what nobody sent keeps its value."""
        return self._rest.finish(self._adapter)
