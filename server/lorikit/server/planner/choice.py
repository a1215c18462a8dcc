# SPDX-License-Identifier: Apache-2.0
"""What the planner answers: a plan, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from lorikit.server.errors import LorikitError


class DoesNotFitError(LorikitError):
    """No plan fits the device."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Args are one sentence why, and one with the smallest change that would make it fit."""
        super().__init__(f"{reason} {remedy}")
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How an assignment is carried out on one device."""

    precision: str
    micro_batch: int
    predicted_peak_memory_bytes: int
    """With what was learnt of the device's class."""
    memory_factor: float = 1.0
    """What was learnt: the prediction is that of the graph times this factor."""
    runtime: str
    recomputed_layers: tuple[int, ...] = ()
    """Layers whose forward values are made again for the backward pass."""
    kernels: str = "lean"
    """``lean`` or ``fast``; see ``compile.Variant``."""
    seconds_per_step: float = 0.0
    """Estimate for one optimiser step."""
    bound: str = ""
    """Which levers the memory limit pulled, in words; empty where the fastest plan fits."""
