# SPDX-License-Identifier: Apache-2.0
"""FedEx-LoRA: means of A and B, and what they miss of the mean product goes into the base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import adapter_of, mean_over_holders
from lorikit.server.methods.base import AdapterSpace, Contribution, State
from lorikit.server.methods.base_delta import (
    DELTA_ROLES,
    Term,
    check_deltas,
    folded_deltas,
    merged_adapter,
)
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.products import RoundProducts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FedExLoRAConfig(SameWorkConfig):
    """What FedEx-LoRA leaves to the user; the authors' code weighs ``uniform``."""

    delta_rank: int = 64
    """Largest rank of a module's change of the base; 0 for no limit, which keeps it exact."""

    def __post_init__(self) -> None:
        SameWorkConfig.__post_init__(self)
        check_deltas(self.delta_rank, self.scale)


class FedExLoRA(SameWork[FedExLoRAConfig]):
    """FedIT whose aggregation error is added to the base, so that the model is the exact mean.

    Unlike stacking, the adapters survive the round, so nothing has to start again from B = 0.

    Equations:
        Abar = sum_k p_k A_k      Bbar = sum_k p_k B_k      M = sum_k p_k s B_k A_k
        base:    D <- D + (M - s Bbar Abar)                 kept as thin factors
        model:   W0 + D + s Bbar Abar = W0 + D_before + M

    Ours:
        Data weights p_k. D is one thin pair in float32 beside the base, [d_out, R] times [R, d_in],
        so a small residual is not lost in a 4-bit or 8-bit weight and no layout can transpose it;
        it goes to every device, also to one that was not in the round. The limit ``delta_rank``
        cuts the accumulated D, not each round's residual; the state's scalar ``delta_lost`` says
        how much it cut.

    Source:
        Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning
        of Foundation Models", ACL, https://arxiv.org/abs/2410.09432.
    """

    name = "fedex-lora"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FedEx-LoRA",
        trains="A, B of all layers (or of the same last layers), head",
        sends="the same",
        exact="yes, up to the rank of the base delta",
        upload="sum_m r (d_in + d_out) + h",
        download="sum_m (r + R) (d_in + d_out) + h, R the rank of the base delta",
        source="https://arxiv.org/abs/2410.09432",
        needs=DELTA_ROLES,
    )

    def __init__(self, config: FedExLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or FedExLoRAConfig())

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The means, and the base with what they miss."""
        adapter = adapter_of(state, space)
        products = RoundProducts(space, adapter, self.config.weighting)

        def noted() -> Iterable[Contribution]:
            for contribution in self.facts.alike(contributions, adapter):
                products.add(contribution)
                yield contribution

        means = mean_over_holders(adapter, space, noted(), self.config.weighting)
        names = {a.module: (a.name, b.name) for a, b in space.pairs()}
        changes: dict[str, list[Term]] = {}
        for module, thin in products.means().items():
            a, b = names[module]
            changes[module] = [
                (1.0, thin.left * thin.values, thin.right),
                (-self.config.scale, means[b], means[a]),
            ]
        deltas, lost = folded_deltas(space, adapter, changes, self.config.delta_rank)
        return replace(
            state,
            tensors={**means, **deltas},
            scalars={**state.scalars, "delta_lost": lost},
        )

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The means and the base deltas; with a rank, plain LoRA that holds both."""
        return merged_adapter(space, adapter_of(state, space), rank, scale=self.config.scale)
