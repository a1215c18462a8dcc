# SPDX-License-Identifier: Apache-2.0
"""LEGEND: LoRA depth per device, ranks that grow towards the output, per-layer mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import (
    WEIGHTINGS,
    Weighting,
    adapter_of,
    best_of_rank,
    every_layer,
    leading_ranks,
    mean_over_holders,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.device_ranks import held
from lorikit.server.methods.facts import MethodFacts

Distribution = Literal["arithmetic", "halving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendConfig:
    """What LEGEND leaves to the user."""

    rank_budget: int = 0
    """Phi: sum of the ranks over the layers; 0 for the largest whose highest rank is the run's
    largest."""
    distribution: Distribution = "arithmetic"
    """``arithmetic``: ranks rise by ``rank_step`` a layer; ``halving``: half of the budget to the
    last layer, half of the rest to the one before, and so on."""
    rank_step: int = 1
    """delta; at least 0."""
    max_waiting_seconds: float = 0.0
    """eps: longest mean time that devices wait for the slowest in a round; 0 for a share of the
    slowest device's time at full depth."""
    max_waiting_share: float = 0.1
    """That share."""
    min_depth: int = 1
    """Fewest trained layers the search may give the slowest device; memory may force fewer."""
    upload_deadline_seconds: float = 0.0
    """Longest time a device may need to send its layers; 0 for no limit."""
    reassign_every: int = 10
    """H: rounds between two assignments of depth."""
    smoothing: float = 0.8
    """rho: weight of the old estimate when a device reports how long it took; in [0, 1)."""
    local_steps: int = 1
    """tau: optimiser steps a round."""
    weighting: Weighting = "data"
    """``uniform`` (the authors' prototype) or ``data``."""
    download: Literal["all", "own"] = "all"
    """``all``: a device also gets the layers it does not train, so that it trains against the
    model that is evaluated; ``own``: it gets rank-1 zeros there, to save traffic."""
    scale: float = 2.0
    """LoRA scale s, the same in every layer."""

    def __post_init__(self) -> None:
        for name in ("rank_budget", "rank_step", "max_waiting_seconds", "max_waiting_share"):
            _at_least(name, getattr(self, name), 0)
        for name in ("min_depth", "reassign_every", "local_steps"):
            _at_least(name, getattr(self, name), 1)
        _at_least("upload_deadline_seconds", self.upload_deadline_seconds, 0)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")
        if self.distribution not in ("arithmetic", "halving"):
            raise ValueError(
                f"distribution must be 'arithmetic' or 'halving', got {self.distribution!r}"
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")
        if self.download not in ("all", "own"):
            raise ValueError(f"download must be 'all' or 'own', got {self.download!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one device takes, and how deep it can go."""

    forward: float
    """f: seconds of a full forward pass, per step."""
    per_layer: float
    """mu: extra seconds per trained layer, per step."""
    upload_per_rank: float = 0.0
    """beta: seconds to send one rank of one layer."""
    limit: int
    """Most trained layers that memory and bandwidth allow."""

    def round_seconds(self, depth: int, ranks: Sequence[int], local_steps: int) -> float:
        """t(k) = tau (f + k mu) + beta sum of the ranks of the last k layers."""
        sent = sum(ranks[len(ranks) - depth :])
        return local_steps * (self.forward + depth * self.per_layer) + self.upload_per_rank * sent


class Legend:
    """Trains the last k_i layers of device i, with one rank a layer on all devices.

    Depths follow speed, so that devices wait little for each other; ranks follow the layer and grow
    towards the output. Each layer is averaged over the devices that trained it, without padding or
    truncation, because a rank belongs to a layer and not to a device.

    Equations:
        ranks:   r_l = r_0 + delta l,  sum_l r_l = Phi;  what is left goes to the layers one by one
                 from the output
        time:    t_i(k) = tau (f_i + k mu_i) + beta_i sum_{l >= L-k} r_l
        depths:  share_i = (c_i - c_min) / (c_max - c_min),  c_i = 1 / t_i(L)
                 for gap = 0, 1, ...:  k_i = L - gap + round(gap share_i), or what memory and upload
                 deadline allow; stop at the first gap with mean_i(max_j t_j(k_j) - t_i(k_i)) <= eps
        layers:  theta_l = mean over the devices that trained layer l

    Ours:
        The paper's equations could not be read; timing model and search are our deterministic
        reading of its description. Times come from profiles, and from the scalars
        ``seconds_per_step`` and ``upload_seconds`` of updates where they are there, smoothed.
        ``rank_budget = 0`` takes the largest Phi whose last layer has the run's largest rank. eps
        is ``max_waiting_seconds``, or a share of the slowest device's full round.
        Everybody receives all layers, so that a shallow device trains against the model that is
        evaluated; ``download = "own"`` sends zeros of rank 1 for the others. Data weights;
        ``uniform`` is the authors' prototype.

    Source:
        Liu et al. 2024, "Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous
        Devices", https://arxiv.org/abs/2412.20004.
    """

    name = "legend"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="LEGEND",
        trains="A, B of its last k layers, head",
        sends="the same",
        exact="no, within a layer",
        upload="sum over the modules of its layers of r_l (d_in + d_out) + h",
        download="sum_m r_l (d_in + d_out) + h",
        source="https://arxiv.org/abs/2412.20004",
        accepts=("depths",),
    )

    def __init__(self, config: LegendConfig | None = None) -> None:
        """Args are the method's options."""
        self.config = config or LegendConfig()

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The initial adapter, each layer cut to its rank."""
        by_layer = layer_ranks(self.config, space.layer_count, space.max_rank)
        return State(tensors=leading_ranks(initial, space, _by_module(space, by_layer)))

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """The last k_i layers; depths are kept for ``reassign_every`` rounds."""
        timings = [self._timing(state, space, device) for device in cohort]
        depths = assign_depths(
            timings, layer_ranks(self.config, space.layer_count, space.max_rank), self.config
        )
        if round_number % self.config.reassign_every:
            depths = [
                min(int(held(state, device, "depth", depth)), timing.limit)
                for device, depth, timing in zip(cohort, depths, timings, strict=True)
            ]
        return tuple(
            self._assignment(device.device_id, space, depth)
            for device, depth in zip(cohort, depths, strict=True)
        )

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """Every layer's adapter and the head, with zeros for others' layers if so configured."""
        sent = leading_ranks(adapter_of(state, space), space, assignment.ranks)
        if self.config.download == "own":
            lora = space.named("lora_A", "lora_B")
            for tensor in (t for t in lora if 0 <= t.layer < _lowest(space, assignment)):
                sent[tensor.name] = np.zeros_like(sent[tensor.name])
        return sent

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """Per-layer mean over the holders; the head over all."""
        adapter = adapter_of(state, space)
        devices = dict(state.devices)

        def noted() -> Iterable[Contribution]:
            for contribution in self.facts.alike(contributions, adapter):
                before = devices.get(contribution.device_id, {})
                devices[contribution.device_id] = self._memory(before, space, contribution)
                yield contribution

        means = mean_over_holders(adapter, space, noted(), self.config.weighting)
        return replace(state, tensors=means, devices=devices)

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """All layers at their own ranks, larger ones replaced by their best of rank ``rank``."""
        return best_of_rank(adapter_of(state, space), space, rank)

    def _assignment(self, device_id: str, space: AdapterSpace, depth: int) -> Assignment:
        layers = every_layer(space)
        lowest = space.layer_count - depth
        by_layer = layer_ranks(self.config, space.layer_count, space.max_rank)
        if self.config.download == "own":
            by_layer = [1] * lowest + by_layer[lowest:]
        return Assignment(
            device_id=device_id,
            ranks=_by_module(space, by_layer),
            trained_layers=layers[lowest:],
            kept_layers=layers,
            scale=self.config.scale,
        )

    def _timing(self, state: State, space: AdapterSpace, device: Participant) -> Timing:
        layers, forward = space.layer_count, device.forward_fraction
        full = device.seconds_per_step
        measured = held(state, device, "seconds_per_step", 0.0)
        if measured > 0:
            depth = held(state, device, "depth", layers)
            full = measured / (forward + (1 - forward) * depth / layers)
        beta = held(state, device, "upload_seconds_per_rank", device.upload_seconds_per_rank)
        ranks = layer_ranks(self.config, layers, space.max_rank)
        return Timing(
            forward=forward * full,
            per_layer=(1 - forward) * full / layers,
            upload_per_rank=beta,
            limit=min(device.max_depth, layers, self._sendable_depth(beta, ranks)),
        )

    def _sendable_depth(self, beta: float, ranks: Sequence[int]) -> int:
        """Most layers from the output that can be sent before the upload deadline."""
        deadline = self.config.upload_deadline_seconds or math.inf
        depths = range(len(ranks), 0, -1)
        return next((k for k in depths if beta * sum(ranks[len(ranks) - k :]) <= deadline), 0)

    def _memory(
        self, before: Mapping[str, float], space: AdapterSpace, contribution: Contribution
    ) -> dict[str, float]:
        """What to remember of a device: its depth and smoothed times, the latter per depth."""
        assignment = contribution.assignment
        memory = {**before, "depth": float(len(assignment.trained_layers))}
        if memory["depth"] != before.get("depth"):
            memory.pop("seconds_per_step", None)
        ranks = {a.layer: assignment.ranks[a.module] for a, _ in space.pairs()}
        sent = sum(ranks[layer] for layer in assignment.trained_layers)
        measured = {"seconds_per_step": contribution.scalars.get("seconds_per_step", 0.0)}
        if sent:
            upload = contribution.scalars.get("upload_seconds", 0.0)
            measured["upload_seconds_per_rank"] = upload / sent
        for name, value in measured.items():
            if value > 0 and math.isfinite(value):
                old = memory.get(name, value)
                memory[name] = self.config.smoothing * old + (1 - self.config.smoothing) * value
        return memory


def layer_ranks(config: LegendConfig, layer_count: int, max_rank: int) -> list[int]:
    """Rank of each layer, from input to output, never falling.

    Raises:
        ValueError: The budget asks for a rank above the run's largest.
    """
    if config.distribution == "halving":
        ranks = halving_ranks(config.rank_budget or min(2, layer_count) * max_rank, layer_count)
    elif config.rank_budget:
        ranks = arithmetic_ranks(config.rank_budget, layer_count, config.rank_step)
    else:
        steps = range(layer_count - 1, -1, -1)
        ranks = [max(1, max_rank - config.rank_step * step) for step in steps]
    if max(ranks) > max_rank:
        raise ValueError(
            f"rank_budget {config.rank_budget} gives the last layer rank {max(ranks)}, above the "
            f"run's largest rank {max_rank}; raise max_rank or lower the budget"
        )
    return ranks


def arithmetic_ranks(budget: int, layer_count: int, step: int = 1) -> list[int]:
    """Ranks that rise by ``step`` a layer and sum to ``budget``.

    ``r_0 = floor((budget - step L (L - 1) / 2) / L)``, at least 1; ``r_l = r_0 + step l``; what is
    left goes to the layers one by one from the output. A budget too small for ``r_0 = 1`` is
    exceeded.
    """
    rise = step * layer_count * (layer_count - 1) // 2
    lowest = max(1, (budget - rise) // layer_count)
    left = max(0, budget - rise - lowest * layer_count)
    return [
        lowest + step * layer + (1 if layer >= layer_count - left else 0)
        for layer in range(layer_count)
    ]


def halving_ranks(budget: int, layer_count: int) -> list[int]:
    """Ranks that double towards the output: half of what is left each, the last share twice.

    192 over six layers gives 6, 6, 12, 24, 48, 96. At least 1 a layer.
    """
    left, ranks = budget, []
    for layer in range(layer_count):
        share = left if layer == layer_count - 1 else left // 2
        ranks.append(max(1, share))
        left -= share
    return sorted(ranks)


def assign_depths(
    devices: Sequence[Timing], ranks: Sequence[int], config: LegendConfig
) -> list[int]:
    """Depth of each device: the smallest spread for which the mean waiting time is at most eps.

    Args:
        devices: Timing of each device of the round.
        ranks: Rank of each layer.
        config: eps, tau and the smallest depth.

    Returns:
        Depths in the order of the devices; if no spread meets the bound, those with the smallest
        mean waiting time.
    """
    layer_count, tau = len(ranks), config.local_steps
    full = [device.round_seconds(layer_count, ranks, tau) for device in devices]
    bound = config.max_waiting_seconds or config.max_waiting_share * max(full)
    shares = _shares([1 / seconds for seconds in full])
    best: tuple[float, list[int]] = (math.inf, [])
    for gap in range(max(0, layer_count - config.min_depth) + 1):
        depths = [
            min(layer_count - gap + math.floor(gap * share + 0.5), device.limit)
            for device, share in zip(devices, shares, strict=True)
        ]
        seconds = [
            d.round_seconds(depth, ranks, tau) for d, depth in zip(devices, depths, strict=True)
        ]
        waiting = max(seconds) - sum(seconds) / len(seconds)
        if waiting <= bound:
            return depths
        best = min(best, (waiting, depths), key=lambda candidate: candidate[0])
    return best[1]


def _shares(capabilities: Sequence[float]) -> list[float]:
    """Where each capability lies between the smallest (0) and the largest (1)."""
    low, high = min(capabilities), max(capabilities)
    return [(c - low) / (high - low) if high > low else 1.0 for c in capabilities]


def _by_module(space: AdapterSpace, by_layer: Sequence[int]) -> dict[str, int]:
    """Rank by module; a module outside the layers gets the rank of the last one."""
    last = len(by_layer) - 1
    return {a.module: by_layer[a.layer if a.layer >= 0 else last] for a, _ in space.pairs()}


def _lowest(space: AdapterSpace, assignment: Assignment) -> int:
    return space.layer_count - len(assignment.trained_layers)


def _at_least(name: str, value: float, low: float) -> None:
    if not (value >= low and math.isfinite(value)):
        raise ValueError(f"{name} must be at least {low} and finite, got {value}")
