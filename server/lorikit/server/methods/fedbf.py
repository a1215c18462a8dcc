# SPDX-License-Identifier: Apache-2.0
"""FedBF: federated BitFit, biases and classifier of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FedBFConfig(SameWorkConfig):
    """What FedBF leaves to the user; the authors train with a learning rate of about 1e-3."""


class FedBF(SameWork[FedBFConfig]):
    """BitFit in federation: all bias vectors and the classifier train, FedAvg joins them.

    It is the smallest of FedPETuning's methods on the wire. Its gradients reveal more of a text
    than those of LoRA: the authors recover tokens with F1 0.20 against 0.12 at batch size 1.

    Equations:
        bbar = sum_k p_k b_k      for each bias vector and the classifier

    Ours:
        Nothing but a common smaller depth as an option.

    Source:
        Zhang et al. 2023, "FedPETuning: When Federated Learning Meets the Parameter-Efficient
        Tuning Methods of Pre-trained Language Models", ACL Findings,
        https://arxiv.org/abs/2212.10025.
    """

    name = "fedbf"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FedBF",
        trains="biases of all layers (or of the same last layers), head",
        sends="the same",
        exact="yes",
        upload="sum of the bias lengths + h",
        download="the whole adapter",
        source="https://arxiv.org/abs/2212.10025",
        sent_roles=(("bias", "head"),),
        needs=("bias",),
    )

    def __init__(self, config: FedBFConfig | None = None) -> None:
        """Args are the method's options; the defaults are the authors' where they say them."""
        super().__init__(config or FedBFConfig())
