# SPDX-License-Identifier: Apache-2.0
"""Checks a whole plan before its first step: a device never finds out half way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorikit.proto.directions import SEED_SCALARS
from lorikit.proto.manifest import Manifest
from lorikit.proto.plan import Phase, Plan
from lorikit.proto.tensors import Tensors
from lorikit.quantization import codec
from lorikit.quantization.base import Codec, QuantizationError
from lorikit.sdk._errors import NonFiniteError, PlanRefusedError
from lorikit.sdk._operations import FINAL_OPERATIONS, GRADIENT_OPERATIONS, build
from lorikit.sdk._operations.base import FinalOperation, GradientOperation, Pair
from lorikit.sdk.engines._signature import check_adapter, scalar_inputs, trained_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPlan:
    """A plan that this device can carry out, with its operations made ready."""

    plan: Plan
    codec: Codec
    pairs: tuple[Pair, ...]
    """LoRA factors by module, in the manifest's order."""
    roles: dict[str, str]
    """Role by tensor name."""
    gradient_operations: tuple[tuple[GradientOperation, ...], ...]
    """By phase."""
    operations: tuple[FinalOperation, ...]

    @property
    def steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.steps for phase in self.plan.phases)


def check_plan(plan: Plan, manifest: Manifest, adapter: Tensors) -> CheckedPlan:
    """Check plan and adapter against the package and this SDK.

    Args:
        plan: What the server asks for.
        manifest: The package it is for.
        adapter: The adapter to start from.

    Raises:
        PlanRefusedError: Something in the plan is unknown here or does not fit; names it.
        PackageError: The adapter does not fit the package; names the tensor.
        NonFiniteError: The adapter has a value that is not finite; names the tensor.
    """
    check_adapter(manifest, adapter)
    for name in sorted(adapter):
        if not np.isfinite(adapter[name]).all():
            raise NonFiniteError(f"the adapter as received: {name} has values that are not finite")
    pairs = lora_pairs(manifest)
    operations = tuple(build(operation, FINAL_OPERATIONS) for operation in plan.operations)
    gradient_operations = tuple(_phase_operations(phase, manifest) for phase in plan.phases)
    _check_operations(adapter, pairs, operations, gradient_operations)
    _check_inputs(plan, manifest, operations)
    _check_send(plan, manifest, operations)
    return CheckedPlan(
        plan=plan,
        codec=_codec(plan.codec),
        pairs=pairs,
        roles={tensor.name: tensor.role for tensor in manifest.adapter},
        gradient_operations=gradient_operations,
        operations=operations,
    )


def lora_pairs(manifest: Manifest) -> tuple[Pair, ...]:
    """Names of A and B of each module that has both, in the manifest's order."""
    b = {tensor.module: tensor.name for tensor in manifest.adapter if tensor.role == "lora_B"}
    return tuple(
        (tensor.name, b[tensor.module])
        for tensor in manifest.adapter
        if tensor.role == "lora_A" and tensor.module in b
    )


def adapter_rank(adapter: Tensors, pairs: Sequence[Pair]) -> int:
    """Largest LoRA rank; 0 where there is no LoRA."""
    return max((adapter[a].shape[0] for a, _ in pairs), default=0)


def _phase_operations(phase: Phase, manifest: Manifest) -> tuple[GradientOperation, ...]:
    known = {tensor.name for tensor in manifest.adapter}
    trained = set(trained_tensors(manifest))
    for name in phase.train:
        if name not in known:
            raise PlanRefusedError(f"phase {phase.name!r} trains {name}, unknown to the package")
        if name not in trained and phase.optimizer.name != "mezo":
            raise PlanRefusedError(
                f"phase {phase.name!r} trains {name}, for which the package has no gradient"
            )
    if len(set(phase.train)) != len(phase.train):
        raise PlanRefusedError(f"phase {phase.name!r} lists a tensor twice")
    return tuple(build(operation, GRADIENT_OPERATIONS) for operation in phase.gradient_operations)


def _check_operations(
    adapter: Tensors,
    pairs: Sequence[Pair],
    operations: Sequence[FinalOperation],
    gradient_operations: Sequence[Sequence[GradientOperation]],
) -> None:
    every: list[FinalOperation | GradientOperation] = [*operations]
    every.extend(operation for phase in gradient_operations for operation in phase)
    for operation in every:
        try:
            operation.check(adapter, pairs)
        except ValueError as error:
            raise PlanRefusedError(f"{type(operation).__name__}: {error}") from error


def _check_inputs(plan: Plan, manifest: Manifest, operations: Sequence[FinalOperation]) -> None:
    graphs = {_graph_of(phase, manifest) for phase in plan.phases}
    if any(operation.produces() for operation in operations):
        graphs.add("predict")  # what is measured is measured on features
    for name in sorted(graphs):
        graph = next((graph for graph in manifest.graphs if graph.name == name), None)
        if graph is None:
            raise PlanRefusedError(f"the plan needs a graph {name!r}, which the package lacks")
        missing = [i for i in scalar_inputs(manifest, graph) if i not in plan.inputs]
        if missing:
            raise PlanRefusedError(f"the plan gives no value for the graph's input {missing[0]!r}")


def _graph_of(phase: Phase, manifest: Manifest) -> str:
    """The graph that a phase runs."""
    is_forward_only = phase.optimizer.name == "mezo"
    if is_forward_only and any(graph.name == "evaluate" for graph in manifest.graphs):
        return "evaluate"
    return "train"


def _check_send(plan: Plan, manifest: Manifest, operations: Sequence[FinalOperation]) -> None:
    known = {tensor.name for tensor in manifest.adapter}
    known.update(name for operation in operations for name in operation.produces())
    if any(phase.optimizer.name == "mezo" for phase in plan.phases):
        known.add(SEED_SCALARS)
    for name in plan.send:
        if name not in known:
            raise PlanRefusedError(f"the plan sends {name}, which nothing here has or produces")


def _codec(name: str) -> Codec:
    try:
        return codec(name)
    except (KeyError, QuantizationError) as error:
        raise PlanRefusedError(f"wire codec {name!r} is unknown here; update the app") from error
