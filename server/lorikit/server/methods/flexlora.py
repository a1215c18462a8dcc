# SPDX-License-Identifier: Apache-2.0
"""FlexLoRA: mixed ranks through the exact mean of the products and an SVD per receiver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lorikit.server.aggregate.mean import HolderMean
from lorikit.server.aggregate.product import ProductMean
from lorikit.server.aggregate.split import Split, split
from lorikit.server.methods.adapters import (
    WEIGHTINGS,
    Weighting,
    adapter_of,
    device_weight,
    outside_pairs,
    sent_tensors,
)
from lorikit.server.methods.base import AdapterSpace, Contribution, State
from lorikit.server.methods.rank_per_device import RankPerDevice, RankPerDeviceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexLoRAConfig(RankPerDeviceConfig):
    """What FlexLoRA leaves to the user."""

    split: Split = "b"
    """``b``: all singular values go to B (the paper's code); ``sqrt``: half to each side, so that
    A and B have comparable sizes."""
    weighting: Weighting = "data"
    """``data`` (the paper) or ``uniform``."""

    def __post_init__(self) -> None:
        if self.split not in ("b", "sqrt"):
            raise ValueError(f"split must be 'b' or 'sqrt', got {self.split!r}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")
        if self.scale == 0:
            raise ValueError("scale must not be 0")
        RankPerDeviceConfig.__post_init__(self)


class FlexLoRA(RankPerDevice[FlexLoRAConfig]):
    """Mean of ``s_k B_k A_k``, cut to each receiver's rank by its singular values.

    Per module ``D = sum p_k s_k B_k A_k = U S V^T``; a receiver of rank r gets ``A = V_r^T`` and
    ``B = U_r S_r / s``. The state keeps the pair of the largest rank in use, whose ranks are in
    the order of the singular values, so cutting it gives every receiver its best approximation.

    Source:
        Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
        and Client Resources", https://arxiv.org/abs/2402.11505. The SVD is thin and in float64;
        ranks from memory budgets, ``sqrt`` and live spare ranks (see ``split``) are ours.
    """

    name = "flexlora"

    def __init__(self, config: FlexLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or FlexLoRAConfig())

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The exact mean product of every module, split at the largest rank.

        Unlike a mean of factors this keeps the round's factors until the end: r_k (d_in + d_out)
        float32 values per device and module, at most twice min(d_in, d_out) ranks.
        """
        adapter = adapter_of(state, space)
        products = {
            a.module: ProductMean(adapter[a.name].shape[1], adapter[b.name].shape[0])
            for a, b in space.pairs()
        }
        rest = HolderMean({name: adapter[name].shape for name in outside_pairs(space)})
        devices = dict(state.devices)
        for contribution in contributions:
            rank = self._add(space, contribution, products, rest)
            devices[contribution.device_id] = {"rank": float(rank)}
        tensors = {**adapter, **rest.finish(adapter)}
        for a, b in space.pairs():
            if products[a.module].weight > 0:
                tensors[a.name], tensors[b.name] = split(
                    products[a.module].finish(),
                    space.max_rank,
                    scale=self.config.scale,
                    mode=self.config.split,
                    spare=adapter[a.name],
                )
        return replace(state, tensors=tensors, devices=devices)

    def _add(
        self,
        space: AdapterSpace,
        contribution: Contribution,
        products: dict[str, ProductMean],
        rest: HolderMean,
    ) -> int:
        weight = device_weight(contribution, self.config.weighting)
        sent = sent_tensors(space, contribution)
        for name in outside_pairs(space):
            if name in sent:
                rest.add(name, sent[name], weight)
        rank = 0
        for a, b in space.pairs():
            if a.name in sent and b.name in sent:
                products[a.module].add(
                    sent[a.name],
                    sent[b.name],
                    scale=contribution.assignment.scale,
                    weight=weight,
                )
                rank = max(rank, sent[a.name].shape[0])
        return rank or max(contribution.assignment.ranks.values())
