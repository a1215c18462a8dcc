# SPDX-License-Identifier: Apache-2.0
"""What a correction for differently quantised bases must do, and what it knows of the bases.

A device with the base ``W + E`` learns two things at once: the task, and a repair of its base. The
mean over devices with different E holds repairs that nobody needs, while each device's own is
diluted. A correction says what a device with some base starts from, and what its update counts as.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.product import Float64
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution

CorrectionName = Literal[
    "none", "compensator", "effective-weight", "function-space", "precision-weight"
]
"""Corrections by name."""

Shares = Mapping[str, float]
"""kappa by ``<precision>/<module>``: the share of a base's error that devices had repaired."""


class UnknownBaseError(ValueError):
    """A base that is none of the run's: updates made with it, or for it, cannot be mapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionConfig:
    """Which correction, and how strong."""

    name: CorrectionName = "compensator"
    """``compensator``: private frozen factors beside the base (C1); ``effective-weight`` (C2) and
    ``function-space`` (C3): each base gets its own B; ``precision-weight``: devices with coarse
    bases count less (C4); ``none``."""
    rank: int = 8
    """Of a compensator; at least 1."""
    activation_aware: bool = True
    """Whether errors are weighed by what the layers' inputs look like."""
    share: float = -1.0
    """kappa of ``effective-weight``, at most 1; below 0 it is measured layer by layer."""
    floor: float = 0.05
    """tau of ``precision-weight``: the relative output error of a base at which a device counts
    half as much as one without; above 0."""

    def __post_init__(self) -> None:
        if self.name not in get_args(CorrectionName):
            raise ValueError(
                f"correction must be one of {', '.join(get_args(CorrectionName))}, "
                f"got {self.name!r}"
            )
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.share <= 1:
            raise ValueError(f"share must be at most 1, got {self.share}")
        if not (self.floor > 0 and math.isfinite(self.floor)):
            raise ValueError(f"floor must be above 0 and finite, got {self.floor}")


class Bases(Protocol):
    """The base model at the precisions of a run."""

    @property
    def digest(self) -> str:
        """Of the base model's weights."""
        ...

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that devices may hold."""
        ...

    def weights(self, module: str) -> Float32:
        """W of a LoRA module, [d_out, d_in]."""
        ...

    def error(self, precision: str, module: str) -> Float32:
        """E = Q(W) - W of a LoRA module, [d_out, d_in]."""
        ...

    def input_root(self, module: str) -> Float64 | None:
        """S with S S^T the second moments of the module's inputs; None: all inputs count alike."""
        ...


class BaseCorrection(Protocol):
    """How updates made with different bases become comparable."""

    config: CorrectionConfig
    bases: Bases

    @property
    def needs_deltas(self) -> bool:
        """Whether packages must offer base deltas."""
        ...

    def given(
        self, space: AdapterSpace, adapter: Tensors, assignment: Assignment, shares: Shares
    ) -> Tensors:
        """What a device starts from.

        Args:
            space: The model's adapter tensors.
            adapter: What the method broadcasts.
            assignment: Of the device; its precision says which base it holds.
            shares: Measured in the rounds before.

        Raises:
            UnknownBaseError: No base of that precision.
        """
        ...

    def counted(
        self, space: AdapterSpace, adapter: Tensors, contribution: Contribution
    ) -> Contribution:
        """What an update counts as; ``adapter`` is what the method broadcast, before ``given``.

        Raises:
            UnknownBaseError: No base of that precision.
        """
        ...

    def remaining(self, precision: str, module: str) -> Float32 | Float64:
        """What is left of a base's error before any adapter, [d_out, d_in]."""
        ...

    def relative_error(
        self, precision: str, modules: Sequence[str], *, is_corrected: bool = False
    ) -> float:
        """Error of a base at the outputs of modules over these outputs, or what remains of it."""
        ...


def check_precision(bases: Bases, precision: str) -> None:
    """Nothing for a precision of the run.

    Raises:
        UnknownBaseError: Any other.
    """
    if precision not in bases.precisions:
        raise UnknownBaseError(
            f"no base of precision {precision!r:.40} belongs to model {bases.digest[:12]} of this "
            f"run, which has {', '.join(bases.precisions)}; hand out the work anew"
        )
