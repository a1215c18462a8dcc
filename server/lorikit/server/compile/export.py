# SPDX-License-Identifier: Apache-2.0
"""A torch model with its adapter becomes a forward graph.

Torch exports the model once; everything after that is a pass over the graph. The frozen weights
stay constants in their own [out, in] layout, the adapter tensors and the LoRA scale become inputs.
Of a model whose layers are alike only two layers are exported, and the second is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript import optimizer

from lorikit.server.compile.cleaning import fuse_linear, merge_equal
from lorikit.server.compile.fusions import fuse_forward
from lorikit.server.compile.graph import Array, Graph, Port
from lorikit.server.compile.models import Model, quiet, scaling
from lorikit.server.compile.onnx_format import OPSET, from_onnx
from lorikit.server.compile.replicate import are_alike, replicate_last_layer
from lorikit.server.errors import UnsupportedModelError

FOLD_LIMIT_BYTES = 1 << 16
"""Largest constant the exporter's own computations may be folded into; parameters never are."""


def export_forward(model: Model) -> Graph:
    """Forward graph of the model: its inputs and the adapter in, logits and head features out.

    Inputs: what the task's models read, with symbolic ``batch`` and ``length``; ``lora_scale``
    float32 [] where there is LoRA; every adapter tensor. Outputs: ``logits`` and ``features``, the
    input of the last linear map.
    """
    count = model.layer_count
    if count <= 2 or not are_alike(model.layers):
        return _exported(model)
    with model.with_layers((0, 1)):
        graph = _exported(model)
    parameters = {name: p.detach().numpy() for name, p in model.module.named_parameters()}
    ports = {tensor.name: tensor for tensor in model.adapter}
    replicate_last_layer(graph, model.architecture, count, parameters, ports)
    return graph


def _exported(model: Model) -> Graph:
    inputs, dynamic = _example(model)
    names = list(inputs)
    return to_graph(
        model,
        _Forward(model, names),
        (tuple(inputs.values()), torch.tensor(2.0)),
        input_names=[*names, "lora_scale"],
        output_names=["logits", "features"],
        dynamic_shapes={"arrays": tuple(dynamic.values()), "lora_scale": None},
    )


def to_graph(
    model: Model,
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    *,
    input_names: list[str],
    output_names: list[str],
    dynamic_shapes: dict[str, Any],
) -> Graph:
    """Trace a module that wraps the model as ``base``; frozen weights become constants.

    Args:
        model: Whose parameters are frozen or adapter tensors.
        module: What to trace.
        arguments: To trace with.
        input_names: Of the arrays in ``arguments``, in their order.
        output_names: Of what the module returns.
        dynamic_shapes: Axes of the arguments that stay symbolic.

    Raises:
        UnsupportedModelError: An adapter tensor has no part in the graph.
    """
    with quiet():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
        )
    assert program is not None
    ir_model = program.model
    parameters = _lift_parameters(ir_model, model)
    optimizer.optimize_ir(
        ir_model, input_size_limit=FOLD_LIMIT_BYTES, output_size_limit=FOLD_LIMIT_BYTES
    )
    graph = from_onnx(onnx.shape_inference.infer_shapes(onnx_ir.to_proto(ir_model)))
    _strip_prefix(graph)
    _complete_scopes(graph)
    _freeze(graph, parameters)
    fuse_linear(graph)
    merge_equal(graph)
    fuse_forward(graph)
    return graph


def _example(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]]]:
    """A batch to trace with, and the axes of it that stay symbolic."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    if "pixel_values" in model.kind.inputs:
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.rand(2, model.config.num_channels, height, width)
        return {"pixel_values": pixels}, {"pixel_values": {0: batch}}
    ids = torch.randint(1, min(100, model.config.vocab_size), (2, 7))
    tokens = {0: batch, 1: length}
    arrays = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return arrays, dict.fromkeys(arrays, tokens)


class _Forward(torch.nn.Module):
    """Calls the model with the LoRA scale as a tensor."""

    def __init__(self, model: Model, names: list[str]) -> None:
        super().__init__()
        self.base = model.module
        self._model = model
        self._names = names
        self._lora = model.lora_layers()

    def forward(
        self, arrays: tuple[torch.Tensor, ...], lora_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = [scaling(layer)["default"] for layer in self._lora]
        for layer in self._lora:
            scaling(layer)["default"] = lora_scale
        try:
            inputs = dict(zip(self._names, arrays, strict=True))
            logits, features = self._model.forward(inputs)
        finally:
            for layer, scale in zip(self._lora, before, strict=True):
                scaling(layer)["default"] = scale
        return logits, features.clone()


def _lift_parameters(ir_model: onnx_ir.Model, model: Model) -> dict[str, Array]:
    """Make every parameter an input, so that nothing is folded into it; return the frozen ones.

    A parameter that several modules share goes by the first of its names. Adapter tensors get
    their final names and one rank symbol per module.
    """
    graph = ir_model.graph
    present = {name for name, _ in model.module.named_parameters()}
    tensors = {
        f"base.{model.parameters[t.name]}": t
        for t in model.adapter
        if model.parameters[t.name] in present
    }
    symbols: dict[str, str] = {}
    frozen: dict[str, Array] = {}
    names: dict[int, str] = {}
    for alias, parameter in model.module.named_parameters(prefix="base", remove_duplicate=False):
        name = names.setdefault(id(parameter), alias)
        if alias not in graph.initializers:
            continue
        value = graph.initializers.pop(alias)
        assert value.const_value is not None
        if name in tensors:
            tensor = tensors.pop(name)
            symbol = symbols.setdefault(tensor.module, f"rank_{len(symbols)}")
            value.shape = onnx_ir.Shape(symbol if n == "rank" else n for n in tensor.shape)
            value.name = tensor.name
        else:
            value.name = _clean(name)
            frozen[value.name] = value.const_value.numpy()
        value.const_value = None
        graph.inputs.append(value)
    if tensors:
        raise UnsupportedModelError(f"{_clean(min(tensors))} has no part in the exported graph")
    return frozen


def _clean(name: str) -> str:
    return name.removeprefix("base.")


def _strip_prefix(graph: Graph) -> None:
    """Name values as the base model does: without the wrapper's ``base.``."""
    for node in graph.nodes:
        node.inputs = tuple(_clean(name) for name in node.inputs)
        node.outputs = tuple(_clean(name) for name in node.outputs)
        node.scope = _clean(node.scope)
    graph.constants = {_clean(name): value for name, value in graph.constants.items()}
    graph.inputs = [Port(_clean(p.name), p.dtype, p.shape) for p in graph.inputs]
    graph.shapes = {_clean(name): shape for name, shape in graph.shapes.items()}


def _complete_scopes(graph: Graph) -> None:
    """Give nodes of several outputs, which the exporter leaves without, the scope of an input."""
    scopes: dict[str, str] = {}
    for node in graph.nodes:
        if not node.scope and len(node.outputs) > 1:
            node.scope = next((scopes[name] for name in node.inputs if name in scopes), "")
        scopes |= dict.fromkeys(node.outputs, node.scope)


def _freeze(graph: Graph, parameters: Mapping[str, Array]) -> None:
    """Turn the frozen parameters from inputs back into constants."""
    read = {name for node in graph.nodes for name in node.inputs}
    graph.inputs = [p for p in graph.inputs if p.name not in parameters and p.name in read]
    graph.constants.update(parameters)
