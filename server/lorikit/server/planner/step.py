# SPDX-License-Identifier: Apache-2.0
"""What memory and time of a training step depend on, apart from the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """One run of a training graph: which graph, and the lengths it runs with."""

    precision: str
    """Of the base."""
    lowest_trained_layer: int
    """Where backward stops; the number of layers when only the head trains."""
    kept_layers: tuple[int, ...]
    """Layers of the sub-model, ascending."""
    rank: int
    """LoRA rank of every module."""
    micro_batch: int
    """Examples."""
    length: int
    """Tokens of the longest example."""
    recomputed_layers: tuple[int, ...] = ()
    """Layers whose forward values are made again for the backward pass."""
    kernels: str = "lean"
    """``lean`` or ``fast``; see ``compile.Variant``."""

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """Layers with a backward part, the lowest first."""
        return tuple(layer for layer in self.kept_layers if layer >= self.lowest_trained_layer)
