# SPDX-License-Identifier: Apache-2.0
"""FRLoRA: every round starts from the base's principal part; what was learned goes into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import (
    Weighting,
    adapter_of,
    mean_over_holders,
    outside_pairs,
    sent_tensors,
)
from lorikit.server.methods.base import AdapterSpace, Contribution, State
from lorikit.server.methods.base_delta import (
    DELTA_ROLES,
    check_deltas,
    folded_deltas,
    merged_adapter,
)
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FRLoRAConfig(SameWorkConfig):
    """What FRLoRA leaves to the user."""

    weighting: Weighting = "uniform"
    """``uniform`` (the authors' code) or ``data``."""
    delta_rank: int = 128
    """Largest rank of a module's change of the base; 0 for no limit, which keeps it exact. It holds
    the principal part that was taken out, too, so it must not be below the rank of the adapter."""

    def __post_init__(self) -> None:
        SameWorkConfig.__post_init__(self)
        check_deltas(self.delta_rank, self.scale)


class FRLoRA(SameWork[FRLoRAConfig]):
    """LoRA that starts each round from the principal part of the pre-trained weight.

    The principal part is taken out of the base once, so that the function is unchanged; after a
    round the change of the mean adapter is folded into the base, and the adapter goes back to where
    it started. The rounds together can change the base by any rank.

    Equations:
        start:   U S V^T = svd(W0),  B0 = U_r (S_r / s)^(1/2),  A0 = (S_r / s)^(1/2) V_r^T
                 D = - s B0 A0
        server:  D <- D + s (Bbar Abar - B0 A0);  A, B <- A0, B0;  the head is averaged, not reset

    Ours:
        D is a thin pair beside the base instead of a changed base, so it may be quantised, and a
        device that was away gets all of it. Devices get A0, B0 and D; in the paper they get Abar,
        Bbar and fold themselves. Beyond ``delta_rank`` the smallest singular values are cut, and
        the state's scalar ``delta_lost`` says how much.

    Source:
        Yan et al. 2025, "Federated Residual Low-Rank Adaption of Large Language Models", ICLR,
        https://openreview.net/forum?id=e0rQRMUhs7.
    """

    name = "frlora"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FRLoRA",
        trains="A, B of all layers (or of the same last layers) from the base's principal part, "
        "head",
        sends="the same",
        exact="no on the mean (cross terms), yes on what goes into the base",
        upload="sum_m r (d_in + d_out) + h",
        download="sum_m (r + R) (d_in + d_out) + h, R the rank of the base delta",
        source="https://openreview.net/forum?id=e0rQRMUhs7",
        needs=DELTA_ROLES,
        start="principal",
        keeps_coordinates=False,
    )

    def __init__(self, config: FRLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the authors' where they say them."""
        super().__init__(config or FRLoRAConfig())

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The principal parts, and a base without them.

        Args:
            space: The model's adapter tensors.
            initial: A0 and B0 of every module as ``principal_start`` makes them, and the head.

        Raises:
            ValueError: B is 0, so that these are not principal parts; or ``delta_rank`` is below
                the rank.
        """
        state = super().start(space, initial)
        adapter = state.tensors
        for a, b in space.pairs():
            rank = adapter[a.name].shape[0]
            if not adapter[b.name].any():
                raise ValueError(
                    f"{self.facts.title} starts from the principal part of the base, and B of "
                    f"{b.module} is 0; give start values from the base's SVD, or use fedex-lora"
                )
            if 0 < self.config.delta_rank < rank:
                raise ValueError(
                    f"delta_rank {self.config.delta_rank} is below the rank {rank} of the adapter, "
                    "so the base without its principal part cannot be kept; raise it"
                )
        taken = {
            a.module: [(-self.config.scale, adapter[b.name], adapter[a.name])]
            for a, b in space.pairs()
        }
        deltas, _ = folded_deltas(space, adapter, taken, self.config.delta_rank)
        return replace(state, tensors={**adapter, **deltas})

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The base with the change of the mean adapter; the adapter as it started."""
        adapter = adapter_of(state, space)
        trained: set[str] = set()

        def noted() -> Iterable[Contribution]:
            for contribution in self.facts.alike(contributions, adapter):
                trained.update(sent_tensors(space, contribution))
                yield contribution

        means = mean_over_holders(adapter, space, noted(), self.config.weighting)
        scale = self.config.scale
        changes = {
            a.module: [
                (scale, means[b.name], means[a.name]),
                (-scale, adapter[b.name], adapter[a.name]),
            ]
            for a, b in space.pairs()
            if a.name in trained
        }
        deltas, lost = folded_deltas(space, adapter, changes, self.config.delta_rank)
        rest = {name: means[name] for name in outside_pairs(space)}
        return replace(
            state,
            tensors={**adapter, **rest, **deltas},
            scalars={**state.scalars, "delta_lost": lost},
        )

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The principal parts and the base deltas; with a rank, plain LoRA that holds both."""
        return merged_adapter(space, adapter_of(state, space), rank, scale=self.config.scale)
