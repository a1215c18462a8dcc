# SPDX-License-Identifier: Apache-2.0
"""What a step takes on one device: bytes against its limit, seconds at its speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lorikit.proto.device import Profile
from lorikit.server.planner.corrections import MemoryCorrections
from lorikit.server.planner.speed import Work, step_seconds
from lorikit.server.planner.step import StepShape

MEGABYTE = 1_000_000

WEIGHTS_SHARE = 0.08
"""Share of a device's budget that the mapped base may take while a smaller format fits."""


class MemoryModel(Work, Protocol):
    """What the planner needs of a compiler."""

    def predicted_peak_memory(self, step: StepShape, *, baseline_bytes: int) -> int:
        """Predicted peak resident bytes of a device process."""
        ...

    def base_bytes(self, precision: str) -> int:
        """Bytes of the whole base at a precision."""
        ...


class Peaks:
    """Predicted peaks without an app, each asked of the compiler once."""

    def __init__(self, compiler: MemoryModel) -> None:
        """Nothing is known yet."""
        self._compiler = compiler
        self._known: dict[StepShape, int] = {}

    def __call__(self, step: StepShape) -> int:
        """Bytes that a step adds to an app."""
        if step not in self._known:
            self._known[step] = self._compiler.predicted_peak_memory(step, baseline_bytes=0)
        return self._known[step]


class Device:
    """A device's profile, beside what the compiler knows of steps."""

    def __init__(
        self,
        compiler: MemoryModel,
        peaks: Peaks,
        profile: Profile,
        corrections: MemoryCorrections,
        *,
        precisions: Sequence[str],
        batch_size: int,
        safety: float,
    ) -> None:
        """Args.

        Args:
            compiler: Knows operations and sizes.
            peaks: Knows memory.
            profile: Of the device.
            corrections: What earlier reports taught.
            precisions: Allowed on it, the best quality first.
            batch_size: Examples of an optimiser step.
            safety: Share of the limit that a plan may fill.
        """
        self.profile = profile
        self.precisions = tuple(precisions)
        self.memory_factor = corrections.factor(profile.device_class)
        self.budget_bytes = int(profile.memory_limit_bytes * safety)
        self._compiler = compiler
        self._peaks = peaks
        self._batch_size = batch_size

    def peak(self, step: StepShape) -> int:
        """Predicted peak of the process, app included, with the correction of the class."""
        return int((self.profile.memory_baseline_bytes + self._peaks(step)) * self.memory_factor)

    def fits(self, step: StepShape) -> bool:
        """Whether the peak keeps to the budget."""
        return self.peak(step) <= self.budget_bytes

    def excess(self, step: StepShape) -> str:
        """By how much the peak is beyond the budget, in words."""
        return f"{max(self.peak(step) - self.budget_bytes, 0) / MEGABYTE:.0f} MB more"

    def seconds(self, step: StepShape) -> float:
        """Estimate for an optimiser step made of runs of this one."""
        return step_seconds(
            self._compiler,
            step,
            batch_size=self._batch_size,
            speed_gflops=self.profile.speed_gflops,
        )

    def is_light(self, precision: str) -> bool:
        """Whether the base at a precision takes a small share of the limit."""
        allowed = self.profile.memory_limit_bytes * WEIGHTS_SHARE
        return self._compiler.base_bytes(precision) <= allowed
