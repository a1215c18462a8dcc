# SPDX-License-Identifier: Apache-2.0
"""FedIT: every device trains the same LoRA; the server averages A and B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FedITConfig(SameWorkConfig):
    """What FedIT leaves to the user; the paper weighs by ``data``."""


class FedIT(SameWork[FedITConfig]):
    """Data-weighted mean of A and of B over devices that all have the same rank.

    The baseline of the field. The product of the means is not the mean of the products: the cross
    terms ``p_j p_k B_j A_k`` are the aggregation error that other methods remove.

    Equations:
        Abar = sum_k p_k A_k        Bbar = sum_k p_k B_k        p_k = n_k / sum_j n_j
        Bbar Abar = sum_jk p_j p_k B_j A_k        wanted: sum_k p_k B_k A_k

    Ours:
        The task head is averaged with the same weights. Uniform weights, and a common smaller
        depth as an option.

    Source:
        Zhang et al. 2024, "Towards Building the Federated GPT: Federated Instruction Tuning",
        https://arxiv.org/abs/2305.05644.
    """

    name = "fedit"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FedIT",
        trains="A, B of all layers (or of the same last layers), head",
        sends="the same",
        exact="no (cross terms)",
        upload="sum_m r (d_in + d_out) + h",
        download="sum_m r (d_in + d_out) + h",
        source="https://arxiv.org/abs/2305.05644",
    )

    def __init__(self, config: FedITConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or FedITConfig())
