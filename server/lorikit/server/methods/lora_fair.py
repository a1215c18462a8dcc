# SPDX-License-Identifier: Apache-2.0
"""LoRA-FAIR: means of A and B, with B corrected on the server towards the mean product."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from lorikit.proto.tensors import Float32
from lorikit.server.aggregate.correction import cosine_correction, ridge_correction
from lorikit.server.aggregate.product import Thin
from lorikit.server.methods.adapters import adapter_of, mean_over_holders
from lorikit.server.methods.base import AdapterSpace, Contribution, State
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.products import RoundProducts
from lorikit.server.methods.same_work import SameWork, SameWorkConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAFairConfig(SameWorkConfig):
    """What LoRA-FAIR leaves to the user."""

    penalty: float = 0.01
    """lambda: what keeps the corrected B near the mean; 0 fits the product alone, which the paper
    finds worse than no correction."""
    solver: Literal["ridge", "cosine"] = "ridge"
    """``ridge``: squared error, in closed form; ``cosine``: the paper's similarity, by gradient
    descent."""
    steps: int = 100
    """``cosine``: descent steps a module."""
    learning_rate: float = 0.01
    """``cosine``: step size; above 0."""

    def __post_init__(self) -> None:
        SameWorkConfig.__post_init__(self)
        if not (self.penalty >= 0 and math.isfinite(self.penalty)):
            raise ValueError(f"penalty must be at least 0 and finite, got {self.penalty}")
        if self.solver not in ("ridge", "cosine"):
            raise ValueError(f"solver must be 'ridge' or 'cosine', got {self.solver!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if self.scale == 0:
            raise ValueError("scale must not be 0")


class LoRAFair(SameWork[LoRAFairConfig]):
    """FedIT whose mean B is moved so that ``B Abar`` comes near the mean of the products.

    Devices work and send as in FedIT. The server removes most of the cross terms without touching
    the base, and stays near the mean of the factors, from which devices go on.

    Equations:
        Abar = sum_k p_k A_k      Bbar = sum_k p_k B_k      D = sum_k p_k B_k A_k
        ridge:   dB = (D - Bbar Abar) Abar^T (Abar Abar^T + lambda I)^-1,
                 the minimum of ||D - (Bbar + dB) Abar||_F^2 + lambda ||dB||_F^2
        cosine:  dB = argmin 1 - cos(D, (Bbar + dB) Abar) + lambda ||dB||_F
        to all:  Abar, Bbar + dB

    Ours:
        The closed form as the default, since it needs no step size. D is never formed: with its
        thin SVD only r x r and d x r matrices appear, in float64.

    Source:
        Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and
        Initialization Refinement", ICCV, https://arxiv.org/abs/2411.14961. Official code could not
        be read; lambda is the paper's, steps and step size are ours.
    """

    name = "lora-fair"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="LoRA-FAIR",
        trains="A, B of all layers (or of the same last layers), head",
        sends="the same",
        exact="nearly: the mean product, as far as it lies in the rows of the mean A",
        upload="sum_m r (d_in + d_out) + h",
        download="sum_m r (d_in + d_out) + h",
        source="https://arxiv.org/abs/2411.14961",
    )

    def __init__(self, config: LoRAFairConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or LoRAFairConfig())

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The means, with B corrected."""
        adapter = adapter_of(state, space)
        products = RoundProducts(space, adapter, self.config.weighting)

        def noted() -> Iterable[Contribution]:
            for contribution in self.facts.alike(contributions, adapter):
                products.add(contribution)
                yield contribution

        tensors = mean_over_holders(adapter, space, noted(), self.config.weighting)
        means = products.means()
        for a, b in space.pairs():
            if a.module in means:
                tensors[b.name] = self._corrected(means[a.module], tensors[a.name], tensors[b.name])
        return replace(state, tensors=tensors)

    def _corrected(self, product: Thin, a: Float32, b: Float32) -> Float32:
        config = self.config
        wanted = Thin(product.left, product.values / config.scale, product.right)
        if config.solver == "ridge":
            return ridge_correction(wanted, a, b, penalty=config.penalty)
        return cosine_correction(
            wanted,
            a,
            b,
            penalty=config.penalty,
            steps=config.steps,
            learning_rate=config.learning_rate,
        )
