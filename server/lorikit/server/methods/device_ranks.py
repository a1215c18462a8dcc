# SPDX-License-Identifier: Apache-2.0
"""Which LoRA rank a device gets, where ranks may differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorikit.server.methods.base import Participant, State

RankRule = Literal["budget", "fit", "power-law"]
RANK_RULES: tuple[RankRule, ...] = ("budget", "fit", "power-law")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRankConfig:
    """How a device's rank follows from what it can do."""

    rule: RankRule = "budget"
    """``budget``: ``clip(round(r_max * budget_k / max_j budget_j), r_min, r_max)`` with memory
    limits as budgets (see ``budget_exponent``); ``fit``: the largest rank whose plan fits;
    ``power-law``: drawn from a distribution that is dense at r_min. No rule goes above the largest
    rank that fits."""
    min_rank: int = 2
    """r_min; at least 1."""
    reference_bytes: int = 0
    """``budget``: memory limit that earns the largest rank; 0 for the largest limit in the cohort
    (set it when cohorts are small, since a device keeps the first rank it gets)."""
    budget_exponent: float = 1.0
    """``budget``: power to which the share of the largest budget is raised; above 0. Below 1 it
    spreads ranks more evenly over budgets that differ by orders of magnitude (0.4 gives 256 MB,
    512 MB, 2 GB and 8 GB the ranks 2, 3, 5 and 8)."""
    law_exponent: float = 0.1
    """``power-law``: exponent, above 0; smaller is denser at r_min."""

    def __post_init__(self) -> None:
        if self.rule not in RANK_RULES:
            raise ValueError(f"rank rule must be one of {RANK_RULES}, got {self.rule!r}")
        if self.min_rank < 1:
            raise ValueError(f"min_rank must be at least 1, got {self.min_rank}")
        if self.reference_bytes < 0:
            raise ValueError(f"reference_bytes must be at least 0, got {self.reference_bytes}")
        for name in ("budget_exponent", "law_exponent"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0 and finite, got {value}")


def device_ranks(
    config: DeviceRankConfig,
    state: State,
    cohort: Sequence[Participant],
    max_rank: int,
    rng: np.random.Generator,
) -> dict[str, int]:
    """Rank by device id; a rank that the state holds for a device stays or falls, if it must fit.

    Args:
        config: The rule.
        state: Holds ``rank`` for each device that took part before.
        cohort: The round's devices, in any order.
        max_rank: r_max.
        rng: Used by ``power-law`` alone, one draw a device in order of device id.
    """
    if config.min_rank > max_rank:
        raise ValueError(f"min_rank {config.min_rank} is above the largest rank {max_rank}")
    reference = config.reference_bytes or max(p.memory_limit_bytes for p in cohort)
    ranks: dict[str, int] = {}
    for device in sorted(cohort, key=lambda p: p.device_id):
        wanted = _wanted(config, device, reference, max_rank, rng)
        fitting = max(config.min_rank, device.max_rank)
        ranks[device.device_id] = min(int(held(state, device, "rank", wanted)), fitting)
    return ranks


def held(state: State, device: Participant, name: str, default: float) -> float:
    """What the state remembers of a device under that name."""
    memory = {**device.local, **state.devices.get(device.device_id, {})}
    return float(memory.get(name, default))


def _wanted(
    config: DeviceRankConfig,
    device: Participant,
    reference: int,
    max_rank: int,
    rng: np.random.Generator,
) -> int:
    low = config.min_rank
    if config.rule == "fit":
        rank = device.max_rank
    elif config.rule == "power-law":
        rank = low + int((max_rank - low + 1) * rng.power(config.law_exponent))
    else:
        share = device.memory_limit_bytes / reference
        rank = round(max_rank * share**config.budget_exponent)
    return min(max(rank, low), max_rank)
