# SPDX-License-Identifier: Apache-2.0
"""What each method costs for one model, without running anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorikit.server.methods import CONFIGS, FACTS, build_method
from lorikit.server.methods.base import AdapterSpace, Participant, State
from lorikit.server.methods.base_delta import DELTA_ROLES, largest_delta_ranks, with_deltas
from lorikit.server.methods.facts import Cost, MethodFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A method's cost for a device that can do everything the method may ask."""

    rounds: tuple[Cost, ...]
    """Costs of the rounds that take turns; one for most methods. Base deltas count at their largest
    rank; a run's packages have them where its method asks. Empty where anything is lacking."""
    lacks: tuple[str, ...] = ()
    """Roles that the package's adapter tensors do not have and the method needs."""


def model_costs(space: AdapterSpace) -> dict[str, ModelCost]:
    """Cost of each method by name, with its default options.

    Args:
        space: The adapter tensors of the model's package.
    """
    return {name: _model_cost(name, facts, space) for name, facts in FACTS.items()}


def _model_cost(name: str, facts: MethodFacts, space: AdapterSpace) -> ModelCost:
    if facts.changes_base:
        space = with_deltas(space)
    lacks = tuple(role for role in facts.roles() if not space.named(role))
    if lacks:
        return ModelCost(rounds=(), lacks=lacks)
    deltas = _delta_ranks(name, space)
    costs = []
    for number in range(len(facts.sent_roles)):
        [work] = build_method(name).assign(
            State(tensors={}), space, number, [_able(space)], np.random.default_rng(0)
        )
        costs.append(
            facts.cost(
                space,
                {**work.ranks, **deltas},
                trained_layers=work.trained_layers,
                kept_layers=work.kept_layers,
                round_number=number,
            )
        )
    return ModelCost(rounds=tuple(costs))


def _delta_ranks(name: str, space: AdapterSpace) -> dict[str, int]:
    """Largest rank of each base delta; 1 where a method has no limit because it folds nothing."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(CONFIGS[name])}
    return largest_delta_ranks(space.named(*DELTA_ROLES), defaults.get("delta_rank", 1))


def _able(space: AdapterSpace) -> Participant:
    return Participant(
        device_id="any",
        memory_limit_bytes=1,
        max_rank=space.max_rank,
        max_depth=space.layer_count,
        max_layers=space.layer_count,
        seconds_per_step=1.0,
    )
