# SPDX-License-Identifier: Apache-2.0
"""RoLoRA: A and B take turns, so that every round's mean is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RoLoRAConfig(SameWorkConfig):
    """What RoLoRA leaves to the user; the paper weighs ``uniform``, our default is ``data``."""


class RoLoRA(SameWork[RoLoRAConfig]):
    """In one round all devices train B with the common A frozen, in the next A with B frozen.

    Each round is exact, because the factor that does not move is the same everywhere, and unlike
    with a random frozen A both factors learn. Compare it at equal numbers of rounds: one round
    moves one factor.

    Equations:
        even rounds (from 0):  Bbar = sum_k p_k B_k      A stays
        odd rounds:            Abar = sum_k p_k A_k      B stays

    Ours:
        Data weights instead of a plain mean. The B round comes first, since A has no gradient
        while B is 0. Devices get both factors each round, so that one that was away is not behind.
        A device's optimiser starts anew each round, so no momentum of a frozen factor is left over.

    Source:
        Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of
        LoRA", https://arxiv.org/abs/2502.01755. No official code was found.
    """

    name = "rolora"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="RoLoRA",
        trains="B in even rounds, A in odd ones, of all layers (or of the same last layers); head",
        sends="the factor that trained, head",
        exact="yes",
        upload="even rounds: sum_m r d_out + h; odd rounds: sum_m r d_in + h",
        download="sum_m r (d_in + d_out) + h",
        source="https://arxiv.org/abs/2502.01755",
        sent_roles=(("lora_B", "head"), ("lora_A", "head")),
    )

    def __init__(self, config: RoLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or RoLoRAConfig())
