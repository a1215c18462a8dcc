# SPDX-License-Identifier: Apache-2.0
"""From a forward graph to the graphs of one package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import AdapterTensor, BlobRef, Graph, Manifest
from lorikit.proto.tensors import Bundle, pack, raw
from lorikit.server.compile import graph as ir
from lorikit.server.compile.cleaning import merge_equal, remove_dead
from lorikit.server.compile.dropout import add_dropout, write_dropout
from lorikit.server.compile.fused_gradients import FUSED_RULES
from lorikit.server.compile.gradients import RULES, add_gradients
from lorikit.server.compile.layers import keep_layers
from lorikit.server.compile.loss import add_loss, add_vocabulary_loss
from lorikit.server.compile.models import Model
from lorikit.server.compile.recompute import recompute_layers, recompute_scores
from lorikit.server.compile.rows import select_rows_early
from lorikit.server.compile.stops import STOP, add_stops, remove_stops, stop_rule
from lorikit.server.compile.verify import Probe
from lorikit.server.compile.weights import Base, KernelReport, minimum_runtime, read_weights
from lorikit.server.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Package:
    """A published package."""

    manifest: Manifest
    ref: BlobRef
    """Blob of the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Which sub-model is compiled, at which depth, for which runtime."""

    precision: str
    lowest_trained_layer: int
    kept_layers: tuple[int, ...]
    runtime: str = "onnx"
    recomputed_layers: tuple[int, ...] = ()
    """Layers whose forward values are made again for the backward pass instead of being kept."""
    kernels: str = "lean"
    """``lean``: least memory; ``fast``: kernels that hold a second, prepacked copy of weights."""


def adapter_of(
    adapter: Sequence[AdapterTensor], variant: Variant, layer_count: int
) -> tuple[AdapterTensor, ...]:
    """Adapter tensors of a variant's sub-model, marked with what its training graph trains.

    The head always trains; a layer's adapter trains from ``lowest_trained_layer`` upwards.
    """
    lowest = variant.lowest_trained_layer
    if not 0 <= lowest <= layer_count:
        raise UnsupportedModelError(
            f"lowest trained layer must lie in 0..{layer_count}, got {lowest}"
        )
    return tuple(
        AdapterTensor(
            name=t.name,
            role=t.role,
            module=t.module,
            layer=t.layer,
            shape=t.shape,
            trained=t.trained and (t.layer < 0 or t.layer >= lowest),
        )
        for t in adapter
        if t.layer < 0 or t.layer in variant.kept_layers
    )


def training_graph(
    forward: ir.Graph, model: Model, variant: Variant, trained: Sequence[str]
) -> ir.Graph:
    """Forward, loss and backward of a variant; frozen weights are still fp32 constants.

    Outputs: ``loss``, ``correct`` and ``<name>.grad`` of each trained tensor.
    """
    graph = _sub_model(forward, model, variant)
    seeds = _add_loss(graph, model)
    rules = FUSED_RULES if variant.runtime == "onnx-training" else RULES
    add_dropout(graph, model.dropout)
    select_rows_early(graph)
    add_stops(graph)
    add_gradients(graph, seeds, trained, {**rules, STOP: stop_rule})
    remove_stops(graph)
    _drop_outputs(graph, "logits", "features")
    merge_equal(graph)
    remove_dead(graph)
    write_dropout(graph)
    recompute_layers(graph, model.architecture, variant.recomputed_layers)
    recompute_scores(graph, model.architecture)
    return graph


def evaluation_graph(forward: ir.Graph, model: Model, variant: Variant) -> ir.Graph:
    """Forward and loss of a variant. Outputs: ``loss`` and ``correct``."""
    graph = _sub_model(forward, model, variant)
    _add_loss(graph, model)
    _drop_outputs(graph, "logits", "features")
    remove_dead(graph)
    select_rows_early(graph)
    return graph


def prediction_graph(forward: ir.Graph, model: Model, variant: Variant) -> ir.Graph:
    """Forward of a variant. Outputs: ``logits`` and ``features``."""
    graph = _sub_model(forward, model, variant)
    select_rows_early(graph)
    return graph


def with_base(graph: ir.Graph, base: Base, variant: Variant) -> tuple[ir.Graph, KernelReport]:
    """The graph reading a stored base, and which kernel each use of it got."""
    graph = graph.copy()
    report = read_weights(graph, base, variant.runtime, variant.kernels)
    remove_dead(graph)
    return graph, report


def manifest_graph(
    name: str, variant: Variant, graph: ir.Graph, blob: BlobRef, report: KernelReport
) -> Graph:
    """Manifest row of a graph."""
    return Graph(
        name=name,
        runtime=variant.runtime,
        blob=blob,
        inputs=tuple(port.name for port in graph.inputs),
        outputs=tuple(port.name for port in graph.outputs),
        minimum_runtime=minimum_runtime(graph) if variant.runtime == "onnx" else "",
        prepack=report.is_prepacked,
    )


def probe_bundle(probe: Probe, names: set[str]) -> bytes:
    """The probe as a blob: tensors ``batch.*``, ``adapter.*``, ``expected.*.grad``, and scalars."""
    batch: dict[str, npt.NDArray[np.generic]] = {
        **probe.inputs,
        "labels": probe.labels,
        "weights": probe.weights,
    }
    tensors = {f"batch.{name}": raw(value.astype(np.float32)) for name, value in batch.items()}
    tensors |= {f"adapter.{n}": raw(v) for n, v in probe.adapter.items() if n in names}
    tensors |= {f"expected.{n}.grad": raw(v) for n, v in probe.gradients.items()}
    return pack(Bundle(tensors, {"expected.loss": probe.loss, "input.lora_scale": probe.scale}))


def _sub_model(forward: ir.Graph, model: Model, variant: Variant) -> ir.Graph:
    graph = forward.copy()
    keep_layers(graph, model.architecture, variant.kept_layers, model.layer_count)
    return graph


def _add_loss(graph: ir.Graph, model: Model) -> dict[str, str]:
    """Append the task's loss; its gradient by the value it was derived at."""
    if model.kind.trains_head:
        return {"logits": add_loss(graph)}
    weight, bias = _frozen_head(graph, model.architecture.head)
    return {"features": add_vocabulary_loss(graph, "features", weight, bias)}


def _frozen_head(graph: ir.Graph, head: str) -> tuple[str, str | None]:
    """Weight and bias of the linear map that makes the logits."""
    inside = [node for node in graph.nodes if node.scope == head]
    products = [node for node in inside if node.op == "FusedMatMul"]
    sums = [node for node in inside if node.op == "Add"]
    if len(products) != 1 or len(sums) > 1:
        found = ", ".join(node.op for node in inside) or "nothing"
        raise UnsupportedModelError(f"the head {head} is {found}, not one linear map")
    made = products[0].outputs[0]
    bias = next((name for node in sums for name in node.inputs if name != made), None)
    return products[0].inputs[1], bias


def _drop_outputs(graph: ir.Graph, *names: str) -> None:
    graph.outputs = [port for port in graph.outputs if port.name not in names]
