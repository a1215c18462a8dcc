# SPDX-License-Identifier: Apache-2.0
"""FedRA: each device holds and trains other layers each round; per-layer mean over the holders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import (
    WEIGHTINGS,
    Weighting,
    adapter_of,
    best_of_rank,
    checked_rank,
    leading_ranks,
    mean_over_holders,
    same_ranks,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.facts import MethodFacts

Allocation = npt.NDArray[np.bool_]
"""Which device holds which layer, [devices, layers]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FedRAConfig:
    """What FedRA leaves to the user."""

    rank: int = 0
    """LoRA rank of every block; 0 for the run's largest."""
    capacity: Literal["fit", "budget"] = "fit"
    """``fit``: a device holds as many layers as its memory allows (the paper); ``budget``: in
    proportion to its memory limit, ``clip(round(L * budget_k / max_j budget_j), 1, L)``, and never
    more than fit."""
    reference_bytes: int = 0
    """``budget``: memory limit that earns all layers; 0 for the largest limit in the cohort."""
    budget_exponent: float = 1.0
    """``budget``: power to which the share of the largest budget is raised; above 0."""
    min_layers: int = 1
    """``budget``: fewest layers of a device."""
    layout: Literal["random", "window"] = "random"
    """``random``: a uniform draw of layers (the paper); ``window``: a run of neighbours."""
    unused: Literal["keep", "repair"] = "keep"
    """A layer that no device drew keeps its value (the paper's code), or is given to a device in
    exchange for a layer that others hold too."""
    keep_last: bool = False
    """Give every device the last block; random sub-models of post-norm encoders need it most."""
    weighting: Weighting = "data"
    """``data`` over a layer's holders, or ``uniform`` (the authors' code)."""
    scale: float = 2.0
    """LoRA scale s; the authors use 1."""

    def __post_init__(self) -> None:
        choices = {
            "capacity": ("fit", "budget"),
            "layout": ("random", "window"),
            "unused": ("keep", "repair"),
            "weighting": WEIGHTINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, low in (("rank", 0), ("reference_bytes", 0), ("min_layers", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not (self.budget_exponent > 0 and math.isfinite(self.budget_exponent)):
            raise ValueError(
                f"budget_exponent must be above 0 and finite, got {self.budget_exponent}"
            )
        if self.layout == "window" and self.unused == "repair":
            raise ValueError("repair would tear windows apart; use layout='random' with it")


class FedRA:
    """Devices too small for the model train random sub-models that cover it together.

    Each round every device holds other layers, as many as fit, in their order; the other blocks are
    dropped. So each layer meets all devices' data, even where no device can hold the whole model,
    which is what is evaluated.

    Equations:
        each round:  row k of the allocation = n_k layers drawn without replacement
        device:      slot(j) = sum_{i <= j} row[i] - 1
        layers:      theta_j = sum_{k in H_j} w_k theta_kj / sum_{k in H_j} w_k  over the holders
                     H_j; without one it stays
        head:        mean over all devices

    Ours:
        Tensors travel under global layer numbers, ``slots`` is needed only inside the device's
        model, and frozen blocks do not travel with the round.
        ``unused = "repair"`` gives a missing layer to the device with the most layers that at least
        two devices hold, in exchange for the one with the most holders, keeping every n_k.
        ``layout = "window"`` draws runs of neighbours, ``keep_last`` gives everybody the last
        block: post-norm encoders (BERT) lose much more than pre-norm models when blocks are left
        out, so measure before you rely on it. n_k can follow memory limits.
        Data weights; ``uniform`` is the authors' code. s is 2 here, 1 in the authors' code.

    Source:
        Su et al. 2024, "FedRA: A Random Allocation Strategy for Federated Tuning to Unleash the
        Power of Heterogeneous Clients", ECCV, https://arxiv.org/abs/2311.11227.
    """

    name = "fedra"
    facts: ClassVar[MethodFacts] = MethodFacts(
        title="FedRA",
        trains="A, B of the layers it drew, head",
        sends="the same",
        exact="no, within a layer",
        upload="sum over the modules of its layers of r (d_in + d_out) + h",
        download="the same",
        source="https://arxiv.org/abs/2311.11227",
        accepts=("layers",),
    )

    def __init__(self, config: FedRAConfig | None = None) -> None:
        """Args are the method's options."""
        self.config = config or FedRAConfig()

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """The initial adapter at the configured rank."""
        ranks = same_ranks(space, checked_rank(self.config.rank, space))
        return State(tensors=leading_ranks(initial, space, ranks))

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """New layers for everybody; draws are made in order of device id."""
        devices = sorted(cohort, key=lambda device: device.device_id)
        capacities = self._capacities(devices, space.layer_count)
        rows = draw(capacities, space.layer_count, rng, self.config)
        if self.config.unused == "repair":
            rows = repair(rows, fixed=(space.layer_count - 1,) if self.config.keep_last else ())
        layers = {
            device.device_id: tuple(int(layer) for layer in np.flatnonzero(row))
            for device, row in zip(devices, rows, strict=True)
        }
        return tuple(self._assignment(d.device_id, space, layers[d.device_id]) for d in cohort)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """Adapters of the device's layers, and the head."""
        adapter = adapter_of(state, space)
        return leading_ranks(adapter, space, assignment.ranks, assignment.kept_layers)

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """Per-layer mean over the holders; the head over all."""
        adapter = adapter_of(state, space)
        alike = self.facts.alike(contributions, adapter)
        means = mean_over_holders(adapter, space, alike, self.config.weighting)
        return replace(state, tensors=means)

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """All layers, or their best approximation of a smaller rank."""
        return best_of_rank(adapter_of(state, space), space, rank)

    def _capacities(self, devices: Sequence[Participant], layer_count: int) -> list[int]:
        """n_k of each device, 1 to L."""
        fitting = [min(max(device.max_layers, 1), layer_count) for device in devices]
        if self.config.capacity == "fit":
            return fitting
        budgets = [device.memory_limit_bytes for device in devices]
        reference = self.config.reference_bytes or max(budgets)
        low = self.config.min_layers
        shares = [(budget / reference) ** self.config.budget_exponent for budget in budgets]
        wanted = [max(low, round(layer_count * share)) for share in shares]
        return [min(want, fits) for want, fits in zip(wanted, fitting, strict=True)]

    def _assignment(
        self, device_id: str, space: AdapterSpace, layers: tuple[int, ...]
    ) -> Assignment:
        return Assignment(
            device_id=device_id,
            ranks=same_ranks(space, checked_rank(self.config.rank, space), layers),
            trained_layers=layers,
            kept_layers=layers,
            scale=self.config.scale,
        )


def draw(
    capacities: Sequence[int], layer_count: int, rng: np.random.Generator, config: FedRAConfig
) -> Allocation:
    """An allocation whose row k has ``capacities[k]`` layers.

    Args:
        capacities: Layers of each device, 1 to ``layer_count``.
        layer_count: L.
        rng: One draw a device.
        config: Layout, and whether the last layer is always held.
    """
    rows = np.zeros((len(capacities), layer_count), dtype=np.bool_)
    free = layer_count - 1 if config.keep_last else layer_count
    for row, capacity in zip(rows, capacities, strict=True):
        wanted = capacity - 1 if config.keep_last else capacity
        row[free:] = True
        if config.layout == "window":
            first = int(rng.integers(free - wanted + 1))
            row[first : first + wanted] = True
        else:
            row[rng.choice(free, size=wanted, replace=False)] = True
    return rows


def repair(rows: Allocation, *, fixed: Sequence[int] = ()) -> Allocation:
    """An allocation in which every layer has a holder, where capacities allow it.

    Missing layers are taken in order; each goes to the device whose row has the most layers that
    at least two devices hold (the first of several), in exchange for the one with the most holders
    (the lowest of several). Every device keeps its number of layers.

    Args:
        rows: [devices, layers].
        fixed: Layers that are never swapped out.
    """
    rows = rows.copy()
    swappable = np.ones(rows.shape[1], dtype=np.bool_)
    swappable[list(fixed)] = False
    for layer in np.flatnonzero(~rows.any(axis=0)):
        holders = rows.sum(axis=0)
        spare = rows & (holders >= 2) & swappable
        device = int(spare.sum(axis=1).argmax())
        if not spare[device].any():
            break
        given = int(np.where(spare[device], holders, 0).argmax())
        rows[device, given], rows[device, layer] = False, True
    return rows


def slots(row: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Position of each layer inside the device's model, and -1 for layers it does not hold.

    ``slot(j) = sum_{i <= j} row[i] - 1``. Only the device's compacted model needs it: on the wire
    tensors keep their global layer numbers.
    """
    return np.where(row, np.cumsum(row) - 1, -1).astype(np.int64)
