# SPDX-License-Identifier: Apache-2.0
"""Profile and memory model -> precision, rank, depth, micro-batch."""

from __future__ import annotations

from lorikit.server.planner.choice import Choice, DoesNotFitError
from lorikit.server.planner.corrections import MemoryCorrections
from lorikit.server.planner.memory import Footprint
from lorikit.server.planner.planner import Planner, lowest_trained_layer
from lorikit.server.planner.step import StepShape

__all__ = [
    "Choice",
    "DoesNotFitError",
    "Footprint",
    "MemoryCorrections",
    "Planner",
    "StepShape",
    "lowest_trained_layer",
]
