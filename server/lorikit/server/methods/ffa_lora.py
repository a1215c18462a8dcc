# SPDX-License-Identifier: Apache-2.0
"""FFA-LoRA: A is drawn once and frozen, only B trains, so the mean is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.methods.base import AdapterSpace, State
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FFALoRAConfig(SameWorkConfig):
    """What FFA-LoRA leaves to the user.

    B wants a larger learning rate than in plain LoRA: set ``learning_rate_factors`` of the run, for
    example ``{"lora_B": 5}``.
    """

    rows: Literal["drawn", "orthogonal"] = "drawn"
    """Rows of A: as drawn (the paper), or made orthogonal at the same mean length, which takes
    some of the luck out of the one draw."""
    train_head: bool = True
    """False keeps the head as the model has it, as the paper's experiments do."""

    def __post_init__(self) -> None:
        SameWorkConfig.__post_init__(self)
        if self.rows not in ("drawn", "orthogonal"):
            raise ValueError(f"rows must be 'drawn' or 'orthogonal', got {self.rows!r}")


class FFALoRA(SameWork[FFALoRAConfig]):
    """A is random, the same everywhere, and never moves; devices train and send B alone.

    With a common A the mean of the factors is the mean of the products, so that nothing is lost
    in aggregation, and noise added for privacy stays linear in the update.

    Equations:
        device:  B_k from Bbar, A frozen
        server:  Bbar = sum_k p_k B_k            sum_k p_k B_k A = Bbar A

    Ours:
        Orthogonal rows as an option, and a head that trains unless told otherwise. Devices get A
        anew each round, since an adapter travels whole.

    Source:
        Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", ICLR,
        https://arxiv.org/abs/2403.12313.
    """

    name = "ffa-lora"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FFA-LoRA",
        trains="B of all layers (or of the same last layers), head; A is drawn once and frozen",
        sends="B, head",
        exact="yes",
        upload="sum_m r d_out + h",
        download="sum_m r (d_in + d_out) + h",
        source="https://arxiv.org/abs/2403.12313",
        sent_roles=(("lora_B", "head"),),
    )

    def __init__(self, config: FFALoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or FFALoRAConfig())

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The initial adapter at the configured rank, with the rows of A as configured."""
        state = super().start(space, initial)
        if self.config.rows == "drawn":
            return state
        rows = {a.name: orthogonal_rows(state.tensors[a.name]) for a, _ in space.pairs()}
        return State(tensors={**state.tensors, **rows})

    def train_roles(self, space: AdapterSpace, round_number: int) -> tuple[str, ...]:
        """B and the head, never A."""
        return ("lora_B", "head") if self.config.train_head else ("lora_B",)


def orthogonal_rows(a: Float32) -> Float32:
    """The same row space with orthogonal rows, all as long as the rows are on average.

    Args:
        a: A, [rank, d_in]; where the rank exceeds d_in the rows come back as they are, since so
            many cannot be orthogonal.
    """
    if a.shape[0] > a.shape[1]:
        return a.copy()
    q, _ = np.linalg.qr(a.astype(np.float64).T)
    length = np.sqrt(np.mean(np.sum(a.astype(np.float64) ** 2, axis=1)))
    return np.asarray(length * q.T, np.float32)
