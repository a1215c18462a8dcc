# SPDX-License-Identifier: Apache-2.0
"""FLoRA: mixed ranks, stacked; each round's result goes into the base and LoRA starts anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import WEIGHTINGS, Weighting, adapter_of
from lorikit.server.methods.base import AdapterSpace, Contribution, State
from lorikit.server.methods.base_delta import (
    DELTA_ROLES,
    check_deltas,
    folded_deltas,
    merged_adapter,
)
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.products import RoundProducts
from lorikit.server.methods.rank_per_device import RankPerDevice, RankPerDeviceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FLoRAConfig(RankPerDeviceConfig):
    """What FLoRA leaves to the user."""

    delta_rank: int = 64
    """Largest rank of a module's change of the base; 0 for no limit, which keeps it exact."""
    weighting: Weighting = "data"
    """``data`` (the paper) or ``uniform``."""
    seed: int = 0
    """Of the fresh A of each round; joined with the round and the module."""

    def __post_init__(self) -> None:
        RankPerDeviceConfig.__post_init__(self)
        check_deltas(self.delta_rank, self.scale)
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")


class FLoRA(RankPerDevice[FLoRAConfig]):
    """The exact mean of products of any ranks, merged into the base; LoRA is new each round.

    Stacking the devices' factors gives the sum of their products without cross terms, whatever
    their ranks. The stack becomes part of the base, and every round starts from a random A and
    B = 0, so the first steps of a round train B alone.

    Equations:
        device:  A_k = A[0:r_k] (random), B_k = 0, trained on top of W0 + D
        stack:   [s B_1 ... s B_K] [p_1 A_1; ...; p_K A_K] = sum_k p_k s B_k A_k
        base:    D <- D + sum_k p_k s B_k A_k       kept as thin factors of rank delta_rank

    Ours:
        Devices get the sum as one thin SVD instead of everybody's adapters, which is smaller and
        shows nobody another device's factors; a device that was away gets the same D and is not
        behind. Beyond ``delta_rank`` the smallest singular values are cut, and the state's scalar
        ``delta_lost`` says how much. p_k stands with the product and is applied once.

    Source:
        Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
        Low-Rank Adaptations", NeurIPS, https://arxiv.org/abs/2409.05976.
    """

    name = "flora"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FLoRA",
        trains="A, B of all layers at its own rank, new each round, head",
        sends="the same",
        exact="yes, up to the rank of the base delta",
        upload="sum_m r_k (d_in + d_out) + h",
        download="sum_m (r_k + R) (d_in + d_out) + h, R the rank of the base delta",
        source="https://arxiv.org/abs/2409.05976",
        accepts=("ranks",),
        needs=DELTA_ROLES,
        keeps_coordinates=False,
    )

    def __init__(self, config: FLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or FLoRAConfig())

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The base after the round, and a fresh LoRA."""
        adapter = adapter_of(state, space)
        products = RoundProducts(space, adapter, self.config.weighting)
        devices = dict(state.devices)
        for contribution in self.facts.alike(contributions, adapter):
            devices[contribution.device_id] = {"rank": float(products.add(contribution))}
        changes = {
            module: [(1.0, thin.left * thin.values, thin.right)]
            for module, thin in products.means().items()
        }
        deltas, lost = folded_deltas(space, adapter, changes, self.config.delta_rank)
        rounds = int(state.scalars.get("rounds", 0)) + 1
        fresh = fresh_pairs(space, adapter, seed=self.config.seed, round_number=rounds)
        return replace(
            state,
            tensors={**adapter, **products.rest(), **deltas, **fresh},
            devices=devices,
            scalars={**state.scalars, "rounds": float(rounds), "delta_lost": lost},
        )

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The fresh LoRA and the base deltas; with a rank, plain LoRA that holds the deltas."""
        return merged_adapter(space, adapter_of(state, space), rank, scale=self.config.scale)


def fresh_pairs(space: AdapterSpace, adapter: Tensors, *, seed: int, round_number: int) -> Tensors:
    """LoRA as it starts: A uniform in +-1 / sqrt(d_in), B zero, of the shapes in ``adapter``."""
    fresh: Tensors = {}
    for index, (a, b) in enumerate(space.pairs()):
        rng = np.random.default_rng([seed, round_number, index])
        shape = adapter[a.name].shape
        bound = 1 / np.sqrt(shape[1])
        fresh[a.name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        fresh[b.name] = np.zeros_like(adapter[b.name])
    return fresh
