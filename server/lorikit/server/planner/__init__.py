# SPDX-License-Identifier: Apache-2.0
"""Profile and memory model -> precision, rank, depth, micro-batch."""

from __future__ import annotations

from lorikit.server.planner.corrections import MemoryCorrections
from lorikit.server.planner.memory import Footprint
from lorikit.server.planner.planner import Choice, DoesNotFitError, Planner, lowest_trained_layer

__all__ = [
    "Choice",
    "DoesNotFitError",
    "Footprint",
    "MemoryCorrections",
    "Planner",
    "lowest_trained_layer",
]
