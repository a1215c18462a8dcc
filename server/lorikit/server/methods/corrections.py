# SPDX-License-Identifier: Apache-2.0
"""Four corrections for differently quantised bases, and none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.base_error import (
    compensator,
    matched_left,
    output_error,
    precision_weight,
    repaired_share,
    seen_by,
)
from lorikit.server.aggregate.product import Float64
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution
from lorikit.server.methods.base_correction import (
    BaseCorrection,
    Bases,
    CorrectionConfig,
    Shares,
    check_precision,
)
from lorikit.server.methods.base_delta import delta_tensors

_WEIGHT_UNIT = 1 << 10
"""Examples are whole numbers: weights by precision keep three more digits in these units."""


class Uncorrected:
    """Updates count as they are; bases that do not belong to the run are still refused."""

    needs_deltas = False

    def __init__(self, bases: Bases, config: CorrectionConfig) -> None:
        """Bind the bases."""
        self.bases = bases
        self.config = config
        self._errors: dict[tuple[str, bool, tuple[str, ...]], float] = {}

    def given(
        self, space: AdapterSpace, adapter: Tensors, assignment: Assignment, shares: Shares
    ) -> Tensors:
        """The adapter as it is."""
        check_precision(self.bases, assignment.precision)
        return adapter

    def counted(
        self, space: AdapterSpace, adapter: Tensors, contribution: Contribution
    ) -> Contribution:
        """The update as it is."""
        check_precision(self.bases, contribution.assignment.precision)
        return contribution

    def remaining(self, precision: str, module: str) -> Float32 | Float64:
        """All of the error."""
        return self.bases.error(precision, module)

    def relative_error(
        self, precision: str, modules: Sequence[str], *, is_corrected: bool = False
    ) -> float:
        """``sqrt(sum ||E X||^2 / sum ||W X||^2)`` over LoRA modules; measured once, then kept."""
        key = (precision, is_corrected, tuple(modules))
        if key not in self._errors:
            noise = signal = 0.0
            left = self.remaining if is_corrected else self.bases.error
            for module in modules:
                root = self.bases.input_root(module)
                noise += output_error(left(precision, module), root) ** 2
                signal += output_error(self.bases.weights(module), root) ** 2
            self._errors[key] = float(np.sqrt(noise / signal)) if signal else 0.0
        return self._errors[key]

    def _root(self, module: str) -> Float64 | None:
        return self.bases.input_root(module) if self.config.activation_aware else None


class Compensators(Uncorrected):
    """C1: every base gets private, frozen thin factors that undo its error.

    Devices then learn the task only, and any method averages as it is. Factors travel as the base
    deltas of a package and never come back; those of one base are the same in every round.

    Equations:
        C_s = argmin over rank r_q of ||(E_s + C) X||_F        base of class s: W + E_s + C_s

    Source:
        FedQLoRA, https://openreview.net/forum?id=uWMQxtmyYz; weighing by inputs is ours.
    """

    needs_deltas = True

    def __init__(self, bases: Bases, config: CorrectionConfig) -> None:
        """Bind the bases; factors are made when a precision is first asked for, and kept."""
        super().__init__(bases, config)
        self._known: dict[tuple[str, str], tuple[Float32, Float32]] = {}

    def factors(self, precision: str, module: str) -> tuple[Float32, Float32]:
        """A [rank, d_in] and B [d_out, rank] of a base's compensator.

        Zeros of rank 1 where the base is exact.
        """
        check_precision(self.bases, precision)
        key = (precision, module)
        if key not in self._known:
            self._known[key] = self._made(precision, module)
        return self._known[key]

    def given(
        self, space: AdapterSpace, adapter: Tensors, assignment: Assignment, shares: Shares
    ) -> Tensors:
        """The adapter and the compensator of the base, beside what the method keeps there."""
        out = dict(adapter)
        for a, b in space.pairs():
            if a.name not in adapter:
                continue
            own_a, own_b = self.factors(assignment.precision, a.module)
            delta_a, delta_b = delta_tensors(a, b)
            if delta_a.name in adapter:
                own_a = np.concatenate([adapter[delta_a.name], own_a])
                own_b = np.concatenate([adapter[delta_b.name], own_b], axis=1)
            out[delta_a.name], out[delta_b.name] = own_a, own_b
        return out

    def remaining(self, precision: str, module: str) -> Float32 | Float64:
        """What the compensator leaves."""
        a, b = self.factors(precision, module)
        return self.bases.error(precision, module) + b.astype(np.float64) @ a

    def _made(self, precision: str, module: str) -> tuple[Float32, Float32]:
        error = self.bases.error(precision, module)
        if not error.any():
            return np.zeros((1, error.shape[1]), np.float32), np.zeros((len(error), 1), np.float32)
        return compensator(error, self.config.rank, self._root(module))


class EffectiveWeights(Uncorrected):
    """C2: the mean is taken of effective weights, and every base gets its difference to it.

    Equations:
        M = sum_k p_k (Delta_k + kappa P_k E_k)        T_s = M - kappa_s P E_s

    P projects on what a pair spans, so that M and T_s keep the pair's rank; only B moves, and any
    method averages the rest as it does. With pairs of full rank and kappa = 1, W + E_s + T_s is the
    same for all bases. Where it is measured, layer by layer,
    ``kappa_k = -<Delta_k, P_k E_k> / ||P_k E_k||^2`` within [0, 1].
    """

    def given(
        self, space: AdapterSpace, adapter: Tensors, assignment: Assignment, shares: Shares
    ) -> Tensors:
        """The adapter with the repair that devices with this base had made, given back."""
        check_precision(self.bases, assignment.precision)
        steps = {}
        for module, a, b in _pairs(space, adapter):
            share = self.config.share
            if share < 0:
                share = shares.get(f"{assignment.precision}/{module}", 0.0)
            if share:
                error = self.bases.error(assignment.precision, module)
                steps[module] = -share / assignment.scale * seen_by(error, a, b, self._root(module))
        return _moved(space, adapter, steps)

    def counted(
        self, space: AdapterSpace, adapter: Tensors, contribution: Contribution
    ) -> Contribution:
        """The update without the repair of its base."""
        assignment = contribution.assignment
        check_precision(self.bases, assignment.precision)
        steps = {}
        for module, a, b in _pairs(space, contribution.tensors):
            error = self.bases.error(assignment.precision, module)
            share = self.config.share
            if share < 0:
                share, _ = repaired_share(
                    error, a, b, scale=assignment.scale, root=self._root(module)
                )
            if share:
                steps[module] = share / assignment.scale * seen_by(error, a, b, self._root(module))
        return replace(contribution, tensors=_moved(space, contribution.tensors, steps))


class FunctionSpace(Uncorrected):
    """C3: every base starts from the B that gives it the outputs of the exact base.

    Equations:
        R_s = argmin over K of ||(E_s - K A) X||_F        B_s = B - R_s / s

    and an update counts with ``R_s / s`` added back. The repair lies in the rows of A, so that it
    needs no inputs of its own and its rank is the adapter's.
    """

    def given(
        self, space: AdapterSpace, adapter: Tensors, assignment: Assignment, shares: Shares
    ) -> Tensors:
        """The adapter with the repair of the base in B."""
        return _moved(space, adapter, self._repairs(space, adapter, assignment))

    def counted(
        self, space: AdapterSpace, adapter: Tensors, contribution: Contribution
    ) -> Contribution:
        """The update with the repair it was given taken away."""
        repairs = self._repairs(space, adapter, contribution.assignment)
        back = {module: -repair for module, repair in repairs.items()}
        return replace(contribution, tensors=_moved(space, contribution.tensors, back))

    def _repairs(
        self, space: AdapterSpace, adapter: Tensors, assignment: Assignment
    ) -> dict[str, Float64]:
        check_precision(self.bases, assignment.precision)
        return {
            module: matched_left(
                self.bases.error(assignment.precision, module), a, self._root(module)
            )
            / -assignment.scale
            for module, a, _ in _pairs(space, adapter)
        }


class PrecisionWeights(Uncorrected):
    """C4: devices count as n_k / (tau^2 + sigma_k^2), sigma_k the output error of their base.

    It goes with methods that weigh by examples; nothing is added to what travels.
    """

    def counted(
        self, space: AdapterSpace, adapter: Tensors, contribution: Contribution
    ) -> Contribution:
        """The update, with examples that stand for its weight."""
        precision, floor = contribution.assignment.precision, self.config.floor
        check_precision(self.bases, precision)
        error = self.relative_error(precision, [a.module for a, _ in space.pairs()])
        exact = precision_weight(1.0, 0.0, floor=floor)
        weight = precision_weight(contribution.examples, error, floor=floor)
        return replace(contribution, examples=max(1, round(_WEIGHT_UNIT * weight / exact)))


CORRECTIONS: Mapping[str, type[Uncorrected]] = {
    "none": Uncorrected,
    "compensator": Compensators,
    "effective-weight": EffectiveWeights,
    "function-space": FunctionSpace,
    "precision-weight": PrecisionWeights,
}
"""Correction by name."""


def build_correction(bases: Bases, config: CorrectionConfig | None = None) -> BaseCorrection:
    """The correction that a configuration names."""
    chosen = config or CorrectionConfig()
    return CORRECTIONS[chosen.name](bases, chosen)


def _pairs(space: AdapterSpace, tensors: Tensors) -> Iterator[tuple[str, Float32, Float32]]:
    """Module, A and B of the pairs that are whole there."""
    for a, b in space.pairs():
        if a.name in tensors and b.name in tensors:
            yield a.module, tensors[a.name], tensors[b.name]


def _moved(space: AdapterSpace, tensors: Tensors, steps: Mapping[str, Float64]) -> Tensors:
    """The tensors with a step added to each B that is there; a pruned one takes the first ranks."""
    out = dict(tensors)
    for _, b in space.pairs():
        if b.module in steps and b.name in tensors:
            step = steps[b.module][:, : tensors[b.name].shape[1]]
            out[b.name] = (tensors[b.name] + step).astype(np.float32)
    return out
