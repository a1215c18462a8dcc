# SPDX-License-Identifier: Apache-2.0
"""FedPEFT-Bias: devices train the biases and the head, the server averages them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, State
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FedPEFTBiasConfig(SameWorkConfig):
    """What FedPEFT-Bias leaves to the user.

    Biases want a learning rate 10 to 100 times that of full fine-tuning.
    """

    tensors: Literal["bias", "norm", "both"] = "bias"
    """``bias``: biases of linear maps and norms (the paper); ``norm``: gains of norms; or
    ``both``. A model without biases, as LLaMA is, trains its gains in place of them."""

    def __post_init__(self) -> None:
        SameWorkConfig.__post_init__(self)
        if self.tensors not in ("bias", "norm", "both"):
            raise ValueError(f"tensors must be 'bias', 'norm' or 'both', got {self.tensors!r}")


class FedPEFTBias(SameWork[FedPEFTBiasConfig]):
    """All weights are frozen; every bias vector and the head train and are averaged by data size.

    A bias enters the forward pass linearly, so the mean of the biases is the mean of the updates.
    A quantised layer keeps its bias in float32, so this needs no other kernels on a device.

    Equations:
        bbar = sum_k p_k b_k      for each bias vector and the head

    Ours:
        Gains of norms as an option, and in place of biases where a model has none.

    Source:
        Sun et al. 2024, "Exploring Parameter-Efficient Fine-Tuning to Enable Foundation Models in
        Federated Learning", IEEE BigData, https://arxiv.org/abs/2210.01708.
    """

    name = "fedpeft-bias"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FedPEFT-Bias",
        trains="biases of all layers (or of the same last layers), head",
        sends="the same",
        exact="yes",
        upload="sum of the bias lengths + h",
        download="the whole adapter",
        source="https://arxiv.org/abs/2210.01708",
        sent_roles=(("bias", "head"),),
    )

    def __init__(self, config: FedPEFTBiasConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or FedPEFTBiasConfig())

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The model's own biases and head.

        Raises:
            ValueError: The package offers neither biases nor gains.
        """
        if not space.named("bias", "norm"):
            raise ValueError(
                f"{self.facts.title} trains tensors of the roles bias or norm, this package has "
                "neither; compile the model for bias tuning, or use fedit"
            )
        return super().start(space, initial)

    def train_roles(self, space: AdapterSpace, round_number: int) -> tuple[str, ...]:
        """Biases or gains, whichever are configured and there, and the head."""
        wanted = ("bias", "norm") if self.config.tensors == "both" else (self.config.tensors,)
        there = tuple(role for role in wanted if space.named(role))
        other = "norm" if space.named("norm") else "bias"
        return (*(there or (other,)), "head")
