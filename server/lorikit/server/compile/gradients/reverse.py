# SPDX-License-Identifier: Apache-2.0
"""The walk from the loss back to the trained tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorikit.server.compile.gradients.parts import Rule, zeros
from lorikit.server.compile.gradients.rules import RULES
from lorikit.server.compile.graph import Graph, Node, Port, Shape, dependents
from lorikit.server.errors import UnsupportedModelError


def add_gradients(
    graph: Graph,
    seeds: Mapping[str, str],
    trained: Sequence[str],
    rules: Mapping[str, Rule] | None = None,
) -> None:
    """Append the backward pass and an output ``<name>.grad`` for each trained input.

    A gradient with several contributions is summed as they come, so that one buffer is held
    however many there are.

    Args:
        graph: Forward graph with known shapes; changed in place.
        seeds: Gradient of the loss by value, for example ``{"logits": ...}``.
        trained: Inputs to differentiate with respect to.
        rules: Rule by operator; None for ``RULES``.

    Raises:
        UnsupportedModelError: An operator on the way has no rule; or a trained input has no effect
            on the loss.
    """
    forward = list(graph.nodes)
    wanted = dependents(graph, trained)
    collected = dict(seeds)
    for node in reversed(forward):
        if not any(name in collected and name in wanted for name in node.outputs):
            continue
        needs = [name in wanted for name in node.inputs]
        rule = (rules or RULES).get(node.op)
        if rule is None:
            raise UnsupportedModelError(
                f"operator {node.op} ({node.scope or 'no scope'}) has no gradient rule; "
                "one in compile/gradients/ would be needed"
            )
        boundary = graph.nodes[-1]
        incoming = _incoming(graph, node, collected)
        gradients = rule(graph, node, incoming, needs)
        for name, gradient, need in zip(node.inputs, gradients, needs, strict=True):
            if need and gradient is not None:
                _collect(graph, collected, name, gradient)
        _set_scope(graph, boundary, node.scope)
    for name in trained:
        if name not in collected:
            raise UnsupportedModelError(f"{name} has no effect on the loss, so it cannot train")
    for name in trained:
        value = collected[name]
        _leave(graph, value, f"{name}.grad", graph.shape(name), len(forward))
        # Two tensors may have the same gradient; the second one then copies the first one's.
        collected = {k: f"{name}.grad" if v == value else v for k, v in collected.items()}


def _incoming(graph: Graph, node: Node, collected: dict[str, str]) -> str:
    """Gradient of a node's result; of a ``Split`` the gradients of its parts, joined."""
    if node.op != "Split":
        return collected.pop(node.outputs[0])
    parts = [
        collected.pop(name) if name in collected else zeros(graph, name) for name in node.outputs
    ]
    axis = node.attributes.get("axis", 0)
    return graph.emit("Concat", *parts, shape=graph.shape(node.inputs[0]), axis=axis)


def _collect(graph: Graph, collected: dict[str, str], name: str, gradient: str) -> None:
    if name in collected:
        gradient = graph.emit(
            "Add", collected[name], gradient, shape=graph.shape(name), hint="grad"
        )
    collected[name] = gradient


def _leave(graph: Graph, value: str, name: str, shape: Shape, first: int) -> None:
    """Let a gradient leave the graph under a name of its own, which its node takes if it can."""
    graph.shapes[name] = shape
    port = Port(name, np.dtype(np.float32), shape)
    taken = {output.name for output in graph.outputs}
    backward = graph.nodes[first:]
    producer = next((node for node in backward if value in node.outputs), None)
    if producer is None or value in taken:
        graph.nodes.append(Node("Identity", (value,), (name,)))
    else:
        producer.outputs = tuple(name if n == value else n for n in producer.outputs)
        for node in backward:
            node.inputs = tuple(name if n == value else n for n in node.inputs)
    graph.outputs.append(port)


def _set_scope(graph: Graph, boundary: Node, scope: str) -> None:
    """Let what a rule emitted belong to the module of its forward node."""
    for node in reversed(graph.nodes):
        if node is boundary:
            return
        node.scope = scope
