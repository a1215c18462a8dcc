# SPDX-License-Identifier: Apache-2.0
"""Repeats a layer of a graph, so that a deep model need not be exported whole.

Exporting two layers takes seconds whatever the depth, and the time of every later pass over the
layers is known from two of them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch

from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.graph import Array, Graph, Node, Port, Shape
from lorikit.server.compile.layers import stream_of
from lorikit.server.errors import UnsupportedModelError


def are_alike(layers: torch.nn.ModuleList) -> bool:
    """Whether all layers after the first compute the same with parameters of the same shapes."""
    first = _signature(layers[0])
    return all(_signature(layer) == first for layer in layers)


def replicate_last_layer(
    graph: Graph,
    architecture: Architecture,
    count: int,
    parameters: Mapping[str, Array],
    ports: Container[str],
) -> None:
    """Repeat layer 1 of a graph with two layers until it has ``count``.

    Args:
        graph: Layers 0 and 1, and what stands before and after them; changed in place.
        architecture: Knows the layer of a name.
        count: Layers to make.
        parameters: Parameters of the whole model by name; frozen ones become constants.
        ports: Names that may become inputs: adapter tensors and the like of the whole model.
    """
    inside = [node for node in graph.nodes if architecture.layer_of(node.scope) == 1]
    entry, result = stream_of(graph, architecture, 1)
    end = max(index for index, node in enumerate(graph.nodes) if node in inside) + 1
    clones: list[Node] = []
    inputs = {port.name: port for port in graph.inputs}
    stream = result
    for layer in range(2, count):
        names = {entry: stream}
        for node in inside:
            names |= _named_anew(graph, node, architecture, layer, names)
        for name in dict.fromkeys(name for node in inside for name in node.inputs):
            own = architecture.in_layer(name, layer)
            if own == name:
                continue
            if name in inputs:
                port = _port(inputs[name], own, layer, ports)
                graph.inputs.append(port)
                graph.shapes[own] = port.shape
            elif name in graph.constants:
                graph.constants[own] = _parameter(own, graph.constants[name], parameters)
            names[name] = own
        clones += [_clone(node, architecture, layer, names) for node in inside]
        stream = names[result]
    outside = [node for node in graph.nodes if node not in inside]
    for node in outside:
        node.inputs = tuple(stream if name == result else name for name in node.inputs)
    graph.nodes[end:end] = clones


def _signature(layer: torch.nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    kind = getattr(layer, "attention_type", None)
    return (str(layer), shapes, kind)


def _named_anew(
    graph: Graph,
    node: Node,
    architecture: Architecture,
    layer: int,
    names: Mapping[str, str],
) -> dict[str, str]:
    """Names of a node's outputs in another layer, with their shapes and types."""
    renamed = {}
    for output in node.outputs:
        own = architecture.in_layer(output, layer)
        new = own if own != output else f"{output}@{layer}"
        renamed[output] = new
        if output in graph.shapes:
            graph.shapes[new] = _relabelled(graph.shapes[output], layer)
        if output in graph.dtypes:
            graph.dtypes[new] = graph.dtypes[output]
    return renamed


def _clone(node: Node, architecture: Architecture, layer: int, names: Mapping[str, str]) -> Node:
    return Node(
        node.op,
        tuple(names.get(name, name) for name in node.inputs),
        tuple(names[name] for name in node.outputs),
        dict(node.attributes),
        node.domain,
        architecture.in_layer(node.scope, layer),
    )


def _port(port: Port, name: str, layer: int, ports: Container[str]) -> Port:
    if name not in ports:
        raise UnsupportedModelError(f"layer {layer} has no adapter tensor {name}")
    return Port(name, port.dtype, _relabelled(port.shape, layer))


def _parameter(name: str, like: Array, parameters: Mapping[str, Array]) -> Array:
    if name not in parameters:
        return like
    return parameters[name]


def _relabelled(shape: Shape, layer: int) -> Shape:
    """Each layer's modules have ranks of their own."""
    return tuple(
        f"{dim}@{layer}" if isinstance(dim, str) and dim.startswith("rank") else dim
        for dim in shape
    )
