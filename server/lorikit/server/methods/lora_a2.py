# SPDX-License-Identifier: Apache-2.0
"""LoRA-A2: A and B take turns, and each device trains the ranks that matter most to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.mean import HolderMean
from lorikit.server.methods.adapters import (
    WEIGHTINGS,
    Weighting,
    adapter_of,
    best_of_rank,
    device_weight,
    every_layer,
    outside_pairs,
    same_ranks,
    sent_tensors,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.base_delta import DELTA_ROLES, delta_tensors
from lorikit.server.methods.device_ranks import device_ranks
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.rank_per_device import RankPerDevice, RankPerDeviceConfig

Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_FACTORS = ("lora_B", "lora_A")
"""The factor that trains in even and in odd rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAA2Config(RankPerDeviceConfig):
    """What LoRA-A2 leaves to the user; the rank options say how many ranks a device may send.

    The paper has B learn five times as fast as A: set ``learning_rate_factors`` of the run to
    ``{"lora_B": 5}``.
    """

    probe_every: int = 10
    """Turns of a factor between two in which a device trains all ranks, for new scores."""
    train_head: bool = True
    """False keeps the head as the model has it, as the paper's experiments do."""
    weighting: Weighting = "data"
    """``data`` (the paper) or ``uniform``."""

    def __post_init__(self) -> None:
        RankPerDeviceConfig.__post_init__(self)
        if self.probe_every < 1:
            raise ValueError(f"probe_every must be at least 1, got {self.probe_every}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")


class LoRAA2(RankPerDevice[LoRAA2Config]):
    """Alternating factors, and a budget of ranks that each device spends where it learns most.

    Every device computes with all r_G ranks of every module, but trains and sends only the
    ``r_k N`` of the ``r_G N`` rank components of the model with the highest scores (N modules).

    Equations:
        even rounds (from 0) train B, odd rounds A, the other factor is frozen
        score in a B round:  S_mi = ||dB_m[:, i]|| ||A_m[i, :]||      dB: change in the last probe
        score in an A round: S_mi = ||B_m[:, i]|| ||dA_m[i, :]||
        device:  trains the columns (rows) of the chosen i alone
        server:  B[:, i] <- B[:, i] + sum over the devices with i of p_k dB_k[:, i]
                 p_k over all devices of the round, so what few chose moves little

    Ours:
        The probe is not an epoch before each round but every ``probe_every``-th turn of a factor
        and a device's first, in which it trains and sends all ranks; scores stay on the server.
        Each module trains at least one rank, within the budget. The ranks not chosen travel in the
        base delta, so that they count in the forward pass and stay frozen, also against weight
        decay.

    Source:
        Koo et al. 2024, "Towards Robust and Efficient Federated Low-Rank Adaptation with
        Heterogeneous Clients", https://arxiv.org/abs/2410.22815, algorithm 1.
    """

    name = "lora-a2"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="LoRA-A2",
        trains="the ranks that matter most to it, of B in even rounds, of A in odd ones; head",
        sends="those columns of B or rows of A, head",
        exact="yes",
        upload="even rounds: sum_m r_km d_out + h; odd rounds: sum_m r_km d_in + h; "
        "sum_m r_km = r_k N",
        download="sum_m r_G (d_in + d_out) + h, r_G + 1 in a probe",
        source="https://arxiv.org/abs/2410.22815",
        accepts=("ranks",),
        sent_roles=(("lora_B", "head"), ("lora_A", "head")),
        needs=DELTA_ROLES,
        keeps_coordinates=False,
    )

    def __init__(self, config: LoRAA2Config | None = None) -> None:
        """Args are the method's options; the defaults are the paper's where it says them."""
        super().__init__(config or LoRAA2Config())

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """The active factor, at all ranks in a probe and at the chosen ones otherwise."""
        budgets = device_ranks(self.config.ranks(), state, cohort, space.max_rank, rng)
        return tuple(
            self._work(state, space, round_number, d.device_id, budgets[d.device_id])
            for d in cohort
        )

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """The chosen ranks as LoRA, the others as a frozen delta."""
        adapter = adapter_of(state, space)
        sent = dict(adapter)
        chosen = self._chosen(state, space, assignment)
        for a, b in space.pairs():
            indices = chosen[a.module]
            rest = np.setdiff1d(np.arange(adapter[a.name].shape[0]), indices)
            sent[a.name] = adapter[a.name][indices]
            sent[b.name] = np.ascontiguousarray(adapter[b.name][:, indices])
            if rest.size:
                delta_a, delta_b = delta_tensors(a, b)
                sent[delta_a.name] = adapter[a.name][rest]
                sent[delta_b.name] = np.float32(self.config.scale) * adapter[b.name][:, rest]
        return sent

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The changes added to the factor that trained; scores of the devices that probed."""
        adapter = adapter_of(state, space)
        sums: dict[str, Float64] = {}
        rest = HolderMean({name: adapter[name].shape for name in outside_pairs(space)})
        tensors, total = dict(state.tensors), 0.0
        for contribution in self.facts.alike(contributions, adapter):
            weight = device_weight(contribution, self.config.weighting)
            total += weight
            sent = sent_tensors(space, contribution)
            for name in outside_pairs(space):
                if name in sent:
                    rest.add(name, sent[name], weight)
            changes = self._changes(state, space, contribution.assignment, sent)
            for name, change in changes.items():
                sums[name] = sums.get(name, 0.0) + weight * change
            if _probes(space, contribution.assignment):
                key = _key(contribution.device_id, _factor(contribution.assignment))
                tensors[key] = _scores(space, adapter, changes)
        tensors |= rest.finish(adapter)
        for name, summed in sums.items():
            tensors[name] = (adapter[name] + summed / total).astype(np.float32)
        return replace(state, tensors=tensors)

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The adapter at r_G, or its best approximation of a smaller rank."""
        adapter = adapter_of(state, space)
        if rank is None:
            return adapter
        deltas = {tensor.name for tensor in space.named(*DELTA_ROLES)}
        plain = best_of_rank(adapter, space, rank)
        return {name: values for name, values in plain.items() if name not in deltas}

    def _work(
        self, state: State, space: AdapterSpace, round_number: int, device_id: str, budget: int
    ) -> Assignment:
        turn, parity = divmod(round_number, 2)
        factor = _FACTORS[parity]
        scores = state.tensors.get(_key(device_id, factor))
        ranks = same_ranks(space, space.max_rank)
        if scores is not None and turn % self.config.probe_every:
            ranks = dict(zip(ranks, chosen_counts(scores, budget), strict=True))
        layers = every_layer(space)
        return Assignment(
            device_id=device_id,
            ranks=ranks,
            trained_layers=layers,
            kept_layers=layers,
            train_roles=(factor, "head") if self.config.train_head else (factor,),
            scale=self.config.scale,
        )

    def _chosen(
        self, state: State, space: AdapterSpace, assignment: Assignment
    ) -> dict[str, Indices]:
        """Rank indices by module that the assignment trains, ascending."""
        scores = state.tensors.get(_key(assignment.device_id, _factor(assignment)))
        if scores is None:
            scores = np.zeros((len(space.pairs()), space.max_rank), np.float32)
        return {
            a.module: chosen_ranks(row, assignment.ranks[a.module])
            for (a, _), row in zip(space.pairs(), scores, strict=True)
        }

    def _changes(
        self, state: State, space: AdapterSpace, assignment: Assignment, sent: Tensors
    ) -> dict[str, Float64]:
        """Change of each tensor of the active factor at full size, zeros where not trained."""
        adapter = adapter_of(state, space)
        chosen = self._chosen(state, space, assignment)
        changes: dict[str, Float64] = {}
        for a, b in space.pairs():
            tensor = b if _factor(assignment) == "lora_B" else a
            if tensor.name not in sent:
                continue
            before = adapter[tensor.name].astype(np.float64)
            where = _at(tensor, chosen[a.module])
            if sent[tensor.name].shape != before[where].shape:
                raise ValueError(
                    f"device {assignment.device_id} sent {tensor.name} of shape "
                    f"{sent[tensor.name].shape}, it was given {before[where].shape}; a device may "
                    "not drop ranks under lora-a2, use hetlora for that"
                )
            changes[tensor.name] = np.zeros_like(before)
            changes[tensor.name][where] = sent[tensor.name] - before[where]
        return changes


def chosen_counts(scores: Float32, budget: int) -> list[int]:
    """How many ranks of each module train: the highest scores of the model, one a module at least.

    Args:
        scores: Score of each rank of each module, [modules, ranks].
        budget: Mean number of ranks a module, at least 1.
    """
    modules, ranks = scores.shape
    best = scores.argmax(axis=1)
    free = scores.astype(np.float64).copy()
    free[np.arange(modules), best] = -np.inf
    more = min(budget, ranks) * modules - modules
    chosen = np.argsort(-free, axis=None, kind="stable")[:more]
    counts = 1 + np.bincount(chosen // ranks, minlength=modules)
    return [int(count) for count in counts]


def chosen_ranks(scores: Float32, count: int) -> Indices:
    """Indices of the ``count`` highest scores, ascending; the first of equal ones."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _scores(space: AdapterSpace, adapter: Tensors, changes: Mapping[str, Float64]) -> Float32:
    """Norm of each rank's change of the product, [modules, ranks]."""
    rows = []
    for a, b in space.pairs():
        left = changes.get(b.name, adapter[b.name])
        right = changes.get(a.name, adapter[a.name])
        rows.append(np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1))
    return np.asarray(rows, np.float32)


def _factor(assignment: Assignment) -> str:
    return "lora_B" if "lora_B" in assignment.train_roles else "lora_A"


def _probes(space: AdapterSpace, assignment: Assignment) -> bool:
    return all(rank == space.max_rank for rank in assignment.ranks.values())


def _at(tensor: AdapterTensor, indices: Indices) -> tuple[slice | Indices, ...]:
    """Where those ranks lie in a factor."""
    return (slice(None), indices) if tensor.role == "lora_B" else (indices,)


def _key(device_id: str, factor: str) -> str:
    """Name under which the state keeps a device's scores."""
    return f"lora_a2.scores.{device_id}.{factor}"
