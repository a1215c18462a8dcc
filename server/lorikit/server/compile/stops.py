# SPDX-License-Identifier: Apache-2.0
"""Places where no gradient flows, though the graph of the forward pass goes through.

The exporter drops ``detach``. DoRA needs it: the norm by which a direction is divided counts as a
constant (Liu et al. 2024, https://arxiv.org/abs/2402.09353, section 4.3), as PEFT has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorikit.server.compile.graph import Graph, Node

STOP = "StopGradient"
"""Operator that passes its input on and its gradient not; it never leaves the compiler."""


def add_stops(graph: Graph) -> int:
    """Put a stop behind every norm of DoRA; return how many."""
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        node.inputs = tuple(renamed.get(name, name) for name in node.inputs)
        nodes.append(node)
        if node.op == "ReduceL2" and ".lora_magnitude_vector" in node.scope:
            (norm,) = node.outputs
            stopped = graph.fresh("stopped")
            graph.shapes[stopped] = graph.shape(norm)
            nodes.append(Node(STOP, (norm,), (stopped,), scope=node.scope))
            renamed[norm] = stopped
    graph.nodes = nodes
    return len(renamed)


def remove_stops(graph: Graph) -> None:
    """Let what reads a stop read what it passes on."""
    passed = {n.outputs[0]: n.inputs[0] for n in graph.nodes if n.op == STOP}
    graph.nodes = [node for node in graph.nodes if node.op != STOP]
    for node in graph.nodes:
        node.inputs = tuple(passed.get(name, name) for name in node.inputs)


def stop_rule(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The gradient rule of a stop."""
    return [None]
