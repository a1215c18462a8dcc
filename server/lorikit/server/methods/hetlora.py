# SPDX-License-Identifier: Apache-2.0
"""HETLORA: each device has its own rank, prunes it by itself, and counts by its norm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lorikit.proto.plan import Operation
from lorikit.proto.tensors import Tensors
from lorikit.server.aggregate.mean import HolderMean
from lorikit.server.aggregate.norms import product_norm
from lorikit.server.aggregate.ranks import pad
from lorikit.server.methods.adapters import (
    adapter_of,
    every_layer,
    leading_ranks,
    outside_pairs,
    same_ranks,
    sent_tensors,
    shapes_of,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.device_ranks import DeviceRankConfig, RankRule, device_ranks

HetWeighting = Literal["norm", "norm-data", "data"]
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "penalty_over": ("mean", "sum"),
    "weighting": ("norm", "norm-data", "data"),
    "granularity": ("device", "module"),
    "rows": ("padded", "holders"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HetLoRAConfig:
    """What HETLORA leaves to the user."""

    gamma: float = 0.99
    """Where the tail starts and the factor ranks shrink by: the tail is rank indices
    ``floor(gamma r)`` to ``r - 1``. 1 switches penalty and pruning off."""
    penalty: float = 5e-4
    """lambda: weight of the tail penalty; 0 switches it off."""
    penalty_over: Literal["mean", "sum"] = "mean"
    """``sum`` over the modules (the paper) or ``mean``, so that lambda means the same for every
    model."""
    rank_rule: RankRule = "budget"
    """See ``DeviceRankConfig.rule``."""
    min_rank: int = 2
    """r_min; the paper uses 5 with r_max = 50."""
    reference_bytes: int = 0
    """See ``DeviceRankConfig.reference_bytes``."""
    budget_exponent: float = 1.0
    """See ``DeviceRankConfig.budget_exponent``."""
    law_exponent: float = 0.1
    """See ``DeviceRankConfig.law_exponent``."""
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
    scale: float = 2.0
    """LoRA scale s, the same whatever the rank."""

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
        self.ranks()

    def ranks(self) -> DeviceRankConfig:
        """The options that say which rank a device gets."""
        return DeviceRankConfig(
            rule=self.rank_rule,
            min_rank=self.min_rank,
            reference_bytes=self.reference_bytes,
            budget_exponent=self.budget_exponent,
            law_exponent=self.law_exponent,
        )


class HetLoRA:
    """Mixed ranks by truncation, self-pruning with a tail penalty, and norm-weighted zero padding.

    Distribution: ``A_k = Abar[0:r_k]``, ``B_k = Bbar[:, 0:r_k]``. The device adds
    ``lambda sum_m ||B_tail||_F ||A_tail||_F`` to its loss and drops the tail if that sum has
    fallen; it keeps the smaller rank for ever. Aggregation: ``Abar = sum_k (S_k / Z) pad(A_k)``,
    likewise B, with ``S_k = ||B_k A_k||_F`` over all modules and ``Z = sum_j S_j``.

    Source:
        Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
        Models", https://arxiv.org/abs/2401.06432. Ours: ranks from memory budgets, data sizes as
        weights where every S_k is 0, the limit on S_k, and no penalty or pruning at r_min.
    """

    name = "hetlora"

    def __init__(self, config: HetLoRAConfig | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        self.config = config or HetLoRAConfig()

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The initial adapter at r_max."""
        return State(tensors=dict(initial))

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """Full depth at the device's own rank."""
        ranks = device_ranks(self.config.ranks(), state, cohort, space.max_rank, rng)
        return tuple(self._assignment(d.device_id, space, ranks[d.device_id]) for d in cohort)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """The first r_k ranks of the global adapter."""
        return leading_ranks(adapter_of(state, space), space, assignment.ranks)

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """Norm-weighted mean of the padded pairs; the head by data size.

        Sums are kept undivided, since Z is known only after the last update.
        """
        adapter = adapter_of(state, space)
        sums = _Sums(adapter, space, self.config, self._norm_limit(state))
        devices = dict(state.devices)
        for contribution in contributions:
            rank = sums.add(contribution)
            devices[contribution.device_id] = {"rank": float(rank)}
        scalars = {"median_norm": statistics.median(sums.norms)} if any(sums.norms) else {}
        return replace(
            state,
            tensors=sums.finish(),
            devices=devices,
            scalars={**state.scalars, **scalars},
        )

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The global adapter, cut as a device of that rank would get it."""
        wanted = space.max_rank if rank is None else rank
        return leading_ranks(adapter_of(state, space), space, same_ranks(space, wanted))

    def _norm_limit(self, state: State) -> float:
        """Largest S_k; no limit in the first round."""
        if self.config.norm_limit == 0 or "median_norm" not in state.scalars:
            return math.inf
        return self.config.norm_limit * state.scalars["median_norm"]

    def _assignment(self, device_id: str, space: AdapterSpace, rank: int) -> Assignment:
        config = self.config
        layers = every_layer(space)
        prunes = rank > config.min_rank and math.floor(config.gamma * rank) < rank
        tail = {"keep": config.gamma, "min_rank": config.min_rank}
        modules = len(space.pairs()) if config.penalty_over == "mean" else 1
        penalty = Operation(
            name="tail_penalty", arguments={"weight": config.penalty / modules, **tail}
        )
        return Assignment(
            device_id=device_id,
            ranks=same_ranks(space, rank),
            trained_layers=layers,
            kept_layers=layers,
            scale=config.scale,
            gradient_operations=(penalty,) if prunes and config.penalty > 0 else (),
            operations=(Operation(name="prune_tail", arguments=tail),) if prunes else (),
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
