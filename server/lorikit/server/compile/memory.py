# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a graph from the life of its values.

Engines run a graph in file order and release a value after its last use, so the peak follows from
the graph
alone: walk the nodes, add what each makes, subtract what has been read for the last time. Values
that only look at another one's bytes (``Reshape`` and its like) cost nothing, and elementwise
operators write over an input that is not read again, as onnxruntime does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorikit.server.compile.graph import Graph, Node, Shape

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"})
"""Operators whose result shares the bytes of their first input."""

IN_PLACE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Exp", "Tanh", "Sqrt", "Softmax", "LogSoftmax", "Relu"}
)
"""Operators that may write their result over an input of the same size."""

_MINIMUM = re.compile(r"Min\((\d+), (\w+)\)")


@dataclass(frozen=True, slots=True)
class Peak:
    """Where a graph needs most."""

    live_bytes: int
    """Largest sum of live values, without inputs and constants."""
    node: str
    """Output of the node at which that happens."""


def peak_memory(graph: Graph, sizes: Mapping[str, int]) -> Peak:
    """Peak of the live values for concrete sizes.

    Args:
        graph: Nodes in execution order, with shapes.
        sizes: Length by symbol, for example ``{"batch": 1, "length": 32, "rank_0": 8}``.
    """
    owner = _owners(graph)
    last_use = _last_uses(graph, owner)
    held: dict[str, int] = {}
    live = peak = 0
    where = ""
    fixed = set(graph.constants) | graph.input_names() | {""}
    for position, node in enumerate(graph.nodes):
        dying = {
            owner[name]
            for name in node.inputs
            if owner.get(name, name) in held and last_use[owner[name]] == position
        }
        for output in node.outputs:
            if owner[output] != output or output in fixed:
                continue
            held[output] = value_bytes(graph, output, sizes)
            reused = _reusable(node, output, dying, held)
            if reused:
                dying.discard(reused)
                live -= held.pop(reused)
            live += held[output]
        if live > peak:
            peak, where = live, node.outputs[0]
        for name in dying:
            live -= held.pop(name, 0)
        for output in node.outputs:
            if last_use.get(owner[output], -1) <= position and owner[output] in held:
                live -= held.pop(owner[output])
    return Peak(peak, where)


def value_bytes(graph: Graph, name: str, sizes: Mapping[str, int]) -> int:
    """Bytes of one value; one of unknown shape is index arithmetic and counts as nothing."""
    shape = graph.shapes.get(name)
    if shape is None:
        return 0
    width = graph.dtypes.get(name, np.dtype(np.float32)).itemsize
    return elements(shape, sizes) * width


def elements(shape: Shape, sizes: Mapping[str, int]) -> int:
    """Number of elements of a shape for concrete sizes."""
    count = 1
    for dim in shape:
        count *= dim if isinstance(dim, int) else _length(dim, sizes)
    return count


def _length(symbol: str, sizes: Mapping[str, int]) -> int:
    if symbol in sizes:
        return sizes[symbol]
    if symbol == "rows":
        return sizes["batch"] * sizes["length"]
    minimum = _MINIMUM.fullmatch(symbol)
    if minimum:
        return min(int(minimum.group(1)), sizes[minimum.group(2)])
    if symbol.startswith("rank"):
        return sizes["rank"]
    return 1


def _owners(graph: Graph) -> dict[str, str]:
    """The value whose bytes each value shares; itself where it has its own."""
    owner = {name: name for name in (*graph.constants, *graph.input_names())}
    for node in graph.nodes:
        for index, output in enumerate(node.outputs):
            shares = node.op in VIEWS and index == 0
            owner[output] = owner[node.inputs[0]] if shares else output
    return owner


def _last_uses(graph: Graph, owner: Mapping[str, str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        for name in node.inputs:
            if name:
                last[owner[name]] = position
    for port in graph.outputs:
        if port.name in owner:
            last[owner[port.name]] = len(graph.nodes)
    return last


def _reusable(node: Node, output: str, dying: set[str], held: Mapping[str, int]) -> str | None:
    if node.op not in IN_PLACE or output != node.outputs[0]:
        return None
    return next((name for name in dying if held.get(name) == held[output]), None)
