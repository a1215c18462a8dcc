# SPDX-License-Identifier: Apache-2.0
"""HETLORA: each device has its own rank, prunes it by itself, and counts by its norm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from lorikit.proto.plan import Operation
from lorikit.proto.tensors import Tensors
from lorikit.server.aggregate.mean import HolderMean
from lorikit.server.aggregate.norms import product_norm
from lorikit.server.aggregate.ranks import pad
from lorikit.server.methods.adapters import (
    adapter_of,
    outside_pairs,
    sent_tensors,
    shapes_of,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, State
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.rank_per_device import RankPerDevice, RankPerDeviceConfig

HetWeighting = Literal["norm", "norm-data", "data"]
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "penalty_over": ("mean", "sum"),
    "weighting": ("norm", "norm-data", "data"),
    "granularity": ("device", "module"),
    "rows": ("padded", "holders"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HetLoRAConfig(RankPerDeviceConfig):
    """What HETLORA leaves to the user; the paper has ``min_rank`` 5 with a largest rank of 50."""

    gamma: float = 0.99
    """Where the tail starts and the factor ranks shrink by: the tail is rank indices
    ``floor(gamma r)`` to ``r - 1``. 1 switches penalty and pruning off."""
    penalty: float = 5e-4
    """lambda: weight of the tail penalty; 0 switches it off."""
    penalty_over: Literal["mean", "sum"] = "mean"
    """``sum`` over the modules (the paper) or ``mean``, so that lambda means the same for every
    model."""
    weighting: HetWeighting = "norm"
    """``norm``: S_k (the paper); ``norm-data``: n_k S_k; ``data``: n_k, plain zero padding."""
    granularity: Literal["device", "module"] = "device"
    """Whether S_k is one number over all modules or one a module."""
    rows: Literal["padded", "holders"] = "padded"
    """``padded``: small ranks add zeros to the higher rows (the paper); ``holders``: each row is
    averaged over the devices that own it, which is a different, later method."""
    norm_limit: float = 0.0
    """Largest S_k, in medians of the round before; 0 for no limit. 3 guards against a device that
    diverges."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {self.gamma}")
        for name in ("penalty", "norm_limit"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        RankPerDeviceConfig.__post_init__(self)


class HetLoRA(RankPerDevice[HetLoRAConfig]):
    """Mixed ranks by truncation, self-pruning with a tail penalty, and norm-weighted zero padding.

    Each device trains the first r_k ranks of the global adapter. A penalty presses on the tail of
    its ranks; where the tail has shrunk the device drops it for good. Devices whose update has a
    larger norm count more, since a small rank with little in it should not water down a large one.

    Equations:
        to device k:  A_k = Abar[0:r_k, :]        B_k = Bbar[:, 0:r_k]
        its loss:     task + lambda sum_m ||B_m[:, q:r_k]||_F ||A_m[q:r_k, :]||_F
                      with q = floor(gamma r_k)
        after it:     if that sum (without lambda) fell, r_k <- max(r_min, q) and the tail is gone
        server:       S_k = sqrt(sum_m ||B_km A_km||_F^2),  Z = sum_k S_k
                      Abar = sum_k (S_k / Z) pad_rows(A_k)
                      Bbar = sum_k (S_k / Z) pad_columns(B_k)

    Ours:
        Ranks from memory limits, or the largest that fits; a device keeps its rank for the run, it
        can only fall. With small cohorts set ``reference_bytes``, since the largest budget is
        looked for in the cohort.
        lambda multiplies the mean over modules, so that it means the same for every model;
        ``penalty_over = "sum"`` is the paper's form.
        No penalty and no pruning at r_min, or with ``gamma = 1``. In a device's first round B is 0,
        so nothing can fall and nothing is pruned.
        If every S is 0, p_k counts. ``norm_limit`` cuts S_k at that many medians of the round
        before, against a device that diverges.
        Rows above a device's rank are diluted by its zeros: that is the published method;
        ``rows = "holders"`` is another one. Norms come from r x r matrices.

    Source:
        Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
        Models", https://arxiv.org/abs/2401.06432. No official code was found.
    """

    name = "hetlora"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="HETLORA",
        trains="A, B of all layers at its own rank, head",
        sends="the same, pruned",
        exact="no (cross terms)",
        upload="sum_m r_k (d_in + d_out) + h, falling",
        download="sum_m r_k (d_in + d_out) + h",
        source="https://arxiv.org/abs/2401.06432",
        accepts=("ranks",),
    )

    def __init__(self, config: HetLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or HetLoRAConfig())

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """Norm-weighted mean of the padded pairs; the head by data size.

        Sums are kept undivided, since Z is known only after the last update.
        """
        adapter = adapter_of(state, space)
        sums = _Sums(adapter, space, self.config, self._norm_limit(state))
        devices = dict(state.devices)
        for contribution in self.facts.alike(contributions, adapter):
            rank = sums.add(contribution)
            devices[contribution.device_id] = {"rank": float(rank)}
        scalars = {"median_norm": statistics.median(sums.norms)} if any(sums.norms) else {}
        return replace(
            state,
            tensors=sums.finish(),
            devices=devices,
            scalars={**state.scalars, **scalars},
        )

    def _norm_limit(self, state: State) -> float:
        """Largest S_k; no limit in the first round."""
        if self.config.norm_limit == 0 or "median_norm" not in state.scalars:
            return math.inf
        return self.config.norm_limit * state.scalars["median_norm"]

    def _assignment(self, device_id: str, space: AdapterSpace, rank: int) -> Assignment:
        config = self.config
        work = super()._assignment(device_id, space, rank)
        if rank <= config.min_rank or math.floor(config.gamma * rank) == rank:
            return work
        tail = {"keep": config.gamma, "min_rank": config.min_rank}
        modules = len(space.pairs()) if config.penalty_over == "mean" else 1
        penalty = Operation(
            name="tail_penalty", arguments={"weight": config.penalty / modules, **tail}
        )
        return replace(
            work,
            gradient_operations=(penalty,) if config.penalty > 0 else (),
            operations=(Operation(name="prune_tail", arguments=tail),),
        )


class _Sums:
    """The sums of one round."""

    def __init__(
        self, adapter: Tensors, space: AdapterSpace, config: HetLoRAConfig, limit: float
    ) -> None:
        self._adapter = adapter
        self._space = space
        self._config = config
        self._limit = limit
        self._by_norm = HolderMean(shapes_of(adapter))
        self._by_data = HolderMean(shapes_of(adapter))
        self.norms: list[float] = []
        """S_k over all modules, device by device, before any limit."""

    def add(self, contribution: Contribution) -> int:
        """Add one update; returns the rank it came with."""
        sent = sent_tensors(self._space, contribution)
        for name in outside_pairs(self._space):
            if name in sent:
                self._by_data.add(name, sent[name], contribution.examples)
        pairs = [(a, b) for a, b in self._space.pairs() if a.name in sent and b.name in sent]
        norms = {a.module: product_norm(sent[a.name], sent[b.name]) for a, b in pairs}
        weights = self._weights(norms, contribution.examples)
        for a, b in pairs:
            self._add_pair(
                (a.name, b.name),
                (sent[a.name], sent[b.name]),
                weights[a.module],
                contribution.examples,
            )
        return max((sent[a.name].shape[0] for a, _ in pairs), default=self._config.min_rank)

    def finish(self) -> Tensors:
        """The means; a pair whose norms are all 0 is averaged by data size."""
        by_norm = self._by_norm.finish(self._adapter)
        by_data = self._by_data.finish(self._adapter)
        return {
            name: by_norm[name] if np.any(self._by_norm.weight(name)) else by_data[name]
            for name in self._adapter
        }

    def _weights(self, norms: Mapping[str, float], examples: int) -> dict[str, float]:
        whole = math.hypot(*norms.values())
        self.norms.append(whole)
        factor = min(1.0, self._limit / whole) if whole > 0 else 1.0
        if self._config.weighting == "data":
            return {module: float(examples) for module in norms}
        if self._config.weighting == "norm-data":
            factor *= examples
        per_module = self._config.granularity == "module"
        return {module: factor * (norm if per_module else whole) for module, norm in norms.items()}

    def _add_pair(
        self,
        names: tuple[str, str],
        values: tuple[np.ndarray, np.ndarray],
        weight: float,
        examples: int,
    ) -> None:
        rank = values[0].shape[0]
        full = self._adapter[names[0]].shape[0]
        a, b = pad(*values, full)
        own = self._config.rows == "holders" and rank < full
        indices = ((slice(0, rank),), (slice(None), slice(0, rank))) if own else (None, None)
        parts = values if own else (a, b)
        for name, part, index in zip(names, parts, indices, strict=True):
            self._by_norm.add(name, part, weight, index=index)
            if not np.any(self._by_norm.weight(name)):
                self._by_data.add(name, part, examples, index=index)
