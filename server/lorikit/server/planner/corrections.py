# SPDX-License-Identifier: Apache-2.0
"""What measured peaks teach about predicted ones, by device class.

A class of devices may hold more or less than predicted for reasons a server cannot see: another
operating system, allocator or build of the runtime. Each report gives a ratio; the factor of its
class moves towards it, never far at once, and stays within bounds whatever is reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

_RATE = 0.3
"""Weight of a new ratio, once a class has given a few."""

ENOUGH_REPORTS = 3
"""Reports of a class after which its factor is believed."""

_LARGEST_MOVE = 0.1
"""Largest change of a factor by one report, as a share of it."""

_LOWEST, _HIGHEST = 0.7, 1.5
"""Bounds of a factor: a report beyond them says more about the report than about memory."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What is known of a class."""

    factor: float = 1.0
    """Measured bytes per predicted byte."""
    reports: int = 0
    """Reports it rests on."""


class MemoryCorrections:
    """A factor per device class, learnt from reports; pure, its owner keeps the JSON."""

    def __init__(self, known: Mapping[str, Correction] | None = None) -> None:
        """Start from what was learnt earlier."""
        self._known = dict(known or {})

    def factor(self, device_class: str) -> float:
        """Measured bytes per predicted byte for a class; 1 for one that has not reported."""
        return self._known.get(device_class, Correction()).factor

    def is_measured(self, device_class: str) -> bool:
        """Whether enough reports of a class came in for its factor to stand for it."""
        return self._known.get(device_class, Correction()).reports >= ENOUGH_REPORTS

    def observe(self, device_class: str, *, predicted_bytes: float, measured_bytes: float) -> None:
        """Learn from one report.

        Args:
            device_class: Of the device.
            predicted_bytes: The peak predicted for it, without correction.
            measured_bytes: The peak it reported; a device that reports none teaches nothing.
        """
        if not (predicted_bytes > 0 and measured_bytes > 0 and math.isfinite(measured_bytes)):
            return
        before = self._known.get(device_class, Correction())
        ratio = min(max(measured_bytes / predicted_bytes, _LOWEST), _HIGHEST)
        rate = max(_RATE, 1 / (before.reports + 1))
        step = math.log(ratio / before.factor) * rate
        bound = math.log1p(_LARGEST_MOVE)
        factor = before.factor * math.exp(min(max(step, -bound), bound))
        self._known[device_class] = Correction(factor, before.reports + 1)

    def to_json(self) -> str:
        """What was learnt, as text."""
        rows = {name: [c.factor, c.reports] for name, c in sorted(self._known.items())}
        return json.dumps(rows, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MemoryCorrections:
        """Read ``to_json``.

        Raises:
            ValueError: Not such a text; names the class that is wrong.
        """
        rows = json.loads(text)
        if not isinstance(rows, dict):
            raise ValueError(f"memory corrections must be a table of classes, got {text[:60]!r}")
        return cls({name: _correction(name, row) for name, row in rows.items()})


def _correction(name: str, row: object) -> Correction:
    match row:
        case [int() | float() as factor, int() as reports] if _LOWEST <= factor <= _HIGHEST:
            return Correction(float(factor), reports)
    raise ValueError(
        f"correction of class {name!r} must be [factor from {_LOWEST} to {_HIGHEST}, reports], "
        f"got {row!r}"
    )
