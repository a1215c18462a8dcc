# SPDX-License-Identifier: Apache-2.0
"""FlexLoRA: mixed ranks through the exact mean of the products and an SVD per receiver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from lorikit.server.aggregate.split import Split, split
from lorikit.server.methods.adapters import (
    WEIGHTINGS,
    Weighting,
    adapter_of,
)
from lorikit.server.methods.base import AdapterSpace, Contribution, State
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.products import RoundProducts
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

    Every device has the rank it can afford, and the server averages what the pairs stand for
    instead of the pairs. The state keeps the pair of the largest rank in use, whose ranks are in
    the order of the singular values, so cutting it gives every receiver its best approximation.

    Equations:
        D = sum_k p_k s_k B_k A_k = U S V^T
        to a device of rank r:  A = V_r^T        B = U_r S_r / s

    Ours:
        The SVD is thin and in float64: QR of the stacked factors, SVD of the small matrix between
        them, O((d_in + d_out) R^2 + R^3) with R the sum of the ranks. Signs are fixed.
        ``split = "sqrt"`` puts sqrt(S / s) on both sides, so that A and B have comparable sizes.
        Ranks that D does not have get B = 0 and an orthonormal row of A: they change nothing and
        can learn, while zeros in both would be dead for ever. Ranks from memory limits. Factors are
        new each round, so there is no server optimiser.

    Source:
        Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
        and Client Resources", https://arxiv.org/abs/2402.11505.
    """

    name = "flexlora"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FlexLoRA",
        trains="A, B of all layers at its own rank, head",
        sends="the same",
        exact="yes; what is sent back is cut to a rank",
        upload="sum_m r_k (d_in + d_out) + h",
        download="sum_m r_k (d_in + d_out) + h",
        source="https://arxiv.org/abs/2402.11505",
        accepts=("ranks",),
        keeps_coordinates=False,
    )

    def __init__(self, config: FlexLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or FlexLoRAConfig())

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The exact mean product of every module, split at the largest rank."""
        adapter = adapter_of(state, space)
        products = RoundProducts(space, adapter, self.config.weighting)
        devices = dict(state.devices)
        for contribution in self.facts.alike(contributions, adapter):
            devices[contribution.device_id] = {"rank": float(products.add(contribution))}
        tensors = {**adapter, **products.rest()}
        means = products.means()
        for a, b in space.pairs():
            if a.module in means:
                tensors[a.name], tensors[b.name] = split(
                    means[a.module],
                    space.max_rank,
                    scale=self.config.scale,
                    mode=self.config.split,
                    spare=adapter[a.name],
                )
        return replace(state, tensors=tensors, devices=devices)
