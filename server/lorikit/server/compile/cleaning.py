# SPDX-License-Identifier: Apache-2.0
"""Passes that make a graph smaller without changing what it computes."""

from __future__ import annotations

from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Shape, needed


def remove_dead(graph: Graph) -> int:
    """Drop nodes and constants that no output needs; return how many nodes went."""
    keep = needed(graph, (port.name for port in graph.outputs))
    before = len(graph.nodes)
    graph.nodes = [n for n in graph.nodes if any(output in keep for output in n.outputs)]
    used = {name for node in graph.nodes for name in node.inputs}
    used.update(port.name for port in graph.outputs)
    graph.constants = {name: value for name, value in graph.constants.items() if name in used}
    graph.external = {name: place for name, place in graph.external.items() if name in used}
    return before - len(graph.nodes)


def merge_equal(graph: Graph) -> int:
    """Compute equal expressions once; return how many nodes went.

    Two nodes are equal when operator, inputs and attributes are. Values of dequantised weights are
    never
    merged: they are made again at each use on purpose, see ``weights.py``.
    """
    seen: dict[tuple[object, ...], Node] = {}
    renamed: dict[str, str] = {}
    outputs = {port.name for port in graph.outputs}
    kept: list[Node] = []
    for node in graph.nodes:
        node.inputs = tuple(renamed.get(name, name) for name in node.inputs)
        attributes = tuple(sorted(node.attributes.items()))
        key = (node.domain, node.op, node.inputs, attributes, len(node.outputs))
        other = seen.get(key)
        if other is None or outputs.intersection(node.outputs):
            seen.setdefault(key, node)
            kept.append(node)
        else:
            renamed.update(zip(node.outputs, other.outputs, strict=True))
    merged = len(graph.nodes) - len(kept)
    graph.nodes = kept
    return merged


def fuse_linear(graph: Graph) -> int:
    """Let a linear map read its [out, in] weight directly; return how many were found.

    ``MatMul(x, Transpose(W))`` becomes ``FusedMatMul(x, W, transB=1)``, so that forward and
    backward use the weight in the one layout it is stored in, and no transposed copy is ever made.
    """
    producers = graph.producers()
    count = 0
    for node in graph.nodes:
        if node.op != "MatMul":
            continue
        transpose = producers.get(node.inputs[1])
        if transpose is None or transpose.op != "Transpose":
            continue
        weight = transpose.inputs[0]
        if len(graph.shape(weight)) != 2:
            continue
        node.op, node.domain = "FusedMatMul", MICROSOFT
        node.inputs = (node.inputs[0], weight)
        node.attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
        output_shape: Shape = (*graph.shape(node.inputs[0])[:-1], graph.shape(weight)[0])
        graph.shapes[node.outputs[0]] = output_shape
        count += 1
    remove_dead(graph)
    return count
