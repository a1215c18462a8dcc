# SPDX-License-Identifier: Apache-2.0
"""How far the devices of each precision pull the average, before and after correction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.base_error import output_error, repaired_share
from lorikit.server.aggregate.product import Float64
from lorikit.server.methods.base import AdapterSpace, Contribution
from lorikit.server.methods.base_correction import BaseCorrection


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassDrift:
    """One precision in one round."""

    precision: str
    devices: int
    weight: float
    """Share of the examples."""
    base_error: float
    """Error of the base at the layers' outputs, over the outputs, before correction."""
    base_error_after: float
    """What the correction leaves of it before any adapter."""
    repair: float
    """Part of the adapter that undoes the base's error, over all of it at the outputs: the repair
    that would go into the average as it was sent."""
    repair_after: float
    """The same of the update as it counts."""
    pull: float
    """Distance of the class's mean update from that of all as sent, times the class's weight, over
    the length of the mean update."""
    pull_after: float
    """The same of the updates as they count."""


@dataclass(slots=True)
class _Class:
    """Sums over the devices of one precision."""

    devices: int = 0
    examples: float = 0.0
    sent: dict[str, Float64] = field(default_factory=dict)
    counted: dict[str, Float64] = field(default_factory=dict)
    repairs: list[float] = field(default_factory=list)
    repairs_after: list[float] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)


class BaseDrift:
    """Watches the updates of a round go by, one at a time.

    Changes are taken against what the method broadcast and weighed by examples; a tensor that a
    device did not send, or only in part, counts as unmoved there. Memory is two adapters per
    precision.
    """

    def __init__(self, correction: BaseCorrection, space: AdapterSpace) -> None:
        """Bind the correction in use and the adapter's tensors."""
        self._correction = correction
        self._space = space
        self._classes: dict[str, _Class] = {}

    def add(self, adapter: Tensors, given: Tensors, sent: Contribution, made: Contribution) -> None:
        """Count one update.

        Args:
            adapter: What the method broadcast.
            given: What the device started from.
            sent: The update.
            made: What it counts as.
        """
        each = self._classes.setdefault(sent.assignment.precision, _Class())
        each.devices += 1
        each.examples += sent.examples
        _add_change(each.sent, sent.tensors, given, sent.examples)
        _add_change(each.counted, made.tensors, adapter, sent.examples)
        before, shares = self._repair(sent, self._correction.bases.error)
        after, _ = self._repair(made, self._correction.remaining)
        each.repairs.append(before)
        each.repairs_after.append(after)
        for module, share in shares.items():
            each.shares.setdefault(module, []).append(share)

    def rows(self) -> list[dict[str, Any]]:
        """``ClassDrift`` of every precision as plain values, by name of the precision."""
        total = sum(each.examples for each in self._classes.values())
        means = [_mean([c.sent for c in self._classes.values()], total)]
        means.append(_mean([c.counted for c in self._classes.values()], total))
        modules = [a.module for a, _ in self._space.pairs()]
        rows = []
        for precision, each in sorted(self._classes.items()):
            measured = self._correction.relative_error
            drift = ClassDrift(
                precision=precision,
                devices=each.devices,
                weight=each.examples / total if total else 0.0,
                base_error=measured(precision, modules),
                base_error_after=measured(precision, modules, is_corrected=True),
                repair=float(np.mean(each.repairs)),
                repair_after=float(np.mean(each.repairs_after)),
                pull=_pull(each.sent, means[0], each.examples, total),
                pull_after=_pull(each.counted, means[1], each.examples, total),
            )
            rows.append(dataclasses.asdict(drift))
        return rows

    def shares(self) -> dict[str, float]:
        """Mean kappa by ``<precision>/<module>``."""
        return {
            f"{precision}/{module}": float(np.mean(values))
            for precision, each in sorted(self._classes.items())
            for module, values in sorted(each.shares.items())
        }

    def _repair(
        self, update: Contribution, error_of: Callable[[str, str], Float32 | Float64]
    ) -> tuple[float, dict[str, float]]:
        """Length of the repair over that of the adapter's product, and kappa by module."""
        scale, precision = update.assignment.scale, update.assignment.precision
        repaired = length = 0.0
        shares: dict[str, float] = {}
        for a, b in self._space.pairs():
            if a.name not in update.tensors or b.name not in update.tensors:
                continue
            left, right = update.tensors[a.name], update.tensors[b.name]
            root = self._correction.bases.input_root(a.module)
            share, squared = repaired_share(
                error_of(precision, a.module), left, right, scale=scale, root=root
            )
            shares[a.module] = share
            repaired += squared
            length += (scale * output_error(right.astype(np.float64) @ left, root)) ** 2
        return (float(np.sqrt(repaired / length)) if length > 0 else 0.0), shares


def _add_change(sums: dict[str, Float64], after: Tensors, before: Tensors, weight: float) -> None:
    for name, values in after.items():
        start = before.get(name)
        if start is None or start.shape != values.shape:
            continue
        change = weight * (values.astype(np.float64) - start)
        if name not in sums:
            sums[name] = change
        elif sums[name].shape == change.shape:
            sums[name] += change


def _mean(classes: list[dict[str, Float64]], total: float) -> dict[str, Float64]:
    mean: dict[str, Float64] = {}
    for sums in classes:
        for name, values in sums.items():
            part = values / total if total else values
            known = mean.get(name)
            mean[name] = part if known is None or known.shape != part.shape else known + part
    return mean


def _pull(
    own: dict[str, Float64], mean: dict[str, Float64], examples: float, total: float
) -> float:
    """``p ||mean of the class - mean|| / ||mean||`` over what the class sent."""
    names = [name for name in own if mean[name].shape == own[name].shape]
    length = sum(float(np.vdot(mean[name], mean[name])) for name in names)
    if not (examples and total and length):
        return 0.0
    away = sum(float(np.square(own[name] / examples - mean[name]).sum()) for name in names)
    return float(examples / total * np.sqrt(away / length))
