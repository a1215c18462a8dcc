# SPDX-License-Identifier: Apache-2.0
"""Rows that nobody reads are not computed: a classifier's last layer works on one token.

A classifier reads one row of the last hidden states, the class token. Between the attention of the
last layer and there every operator treats rows alike and apart, so the one row can be taken before
them instead of behind: queries, attention output and the whole MLP of that layer, forward and
backward, shrink from the length of the text to one row. Only keys and values need all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorikit.server.compile.graph import Graph, Node, Shape

_ALONE = frozenset(
    {"Cast", "Elu", "Erf", "Gelu", "Identity", "LeakyRelu", "Neg", "QuickGelu", "Relu", "Sigmoid",
     "Tanh"}
)  # fmt: skip
"""Operators on each value by itself."""

_TOGETHER = frozenset({"Add", "Div", "Mul", "Pow", "Sub", "Where"})
"""Operators on values at the same place of operands that are broadcast."""

_ALONG = frozenset({"LayerNormalization", "LogSoftmax", "Softmax"})
"""Operators on a row as a whole, by their attribute ``axis``."""

_PRODUCTS = frozenset({"FusedMatMul", "MatMul"})

_END = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Read:
    """A node that needs one row of a value."""

    node: Node
    number: int
    """Of the node's input."""
    axis: int
    """Of the value, along which its rows stand."""


def select_rows_early(graph: Graph) -> int:
    """Take a row of which the others are not read as early as possible, in place.

    To run on a forward graph before ``add_gradients``, behind ``add_dropout`` (masks count all
    rows). A row is one index of ``Gather`` along an axis; where operators end that treat rows
    apart, a ``Slice`` takes it.

    Args:
        graph: Forward graph with shapes.

    Returns:
        How many nodes work on one row now.
    """
    gathers = [node for node in graph.nodes if _takes_one_row(graph, node)]
    return sum(_narrow(graph, node) for node in gathers)


def _takes_one_row(graph: Graph, node: Node) -> bool:
    index = graph.constants.get(node.inputs[1]) if node.op == "Gather" else None
    return index is not None and index.ndim == 0 and node.inputs[0] in graph.shapes


def _narrow(graph: Graph, gather: Node) -> int:
    """Narrow what leads to one ``Gather``; returns how many nodes that were."""
    source = gather.inputs[0]
    position = int(graph.constants[gather.inputs[1]])
    axis = _whole_axis(gather, graph.shape(source), default=0)
    if graph.shape(source)[axis] == 1:
        return 0
    reads = _reads(graph)
    wanted: dict[str, list[_Read]] = {source: [_Read(gather, 0, axis)]}
    nodes: list[Node] = []
    narrowed = 0
    for node in reversed(graph.nodes):
        asked = wanted.get(node.outputs[0], [])
        axes = {read.axis for read in asked}
        operands = None
        if len(axes) == 1 and len(asked) == reads[node.outputs[0]]:
            operands = _row_operands(graph, node, asked[0].axis)
        if operands is None:
            for output in node.outputs:
                nodes.extend(_taken(graph, output, position, wanted.pop(output, []), gather))
        else:
            for number, along in operands.items():
                wanted.setdefault(node.inputs[number], []).append(_Read(node, number, along))
            _shrink(graph, node, asked[0].axis)
            del wanted[node.outputs[0]]
            narrowed += 1
        nodes.append(node)
    for name, asked in wanted.items():
        nodes.extend(_taken(graph, name, position, asked, gather))
    graph.nodes = nodes[::-1]
    if narrowed:
        gather.inputs = (source, graph.constant(0, np.int64))
    return narrowed


def _reads(graph: Graph) -> Mapping[str, int]:
    """How often each value is read; leaving the graph counts as well."""
    reads = Counter(port.name for port in graph.outputs)
    for node in graph.nodes:
        reads.update(node.inputs)
    return reads


def _taken(
    graph: Graph, name: str, position: int, asked: Sequence[_Read], gather: Node
) -> Iterator[Node]:
    """Slices of one row for readers that were narrowed, one along each axis."""
    for axis in sorted({read.axis for read in asked if read.node is not gather}):
        end = position + 1 if position != -1 else _END
        places = [graph.ints(n) for n in (position, end, axis)]
        readers = [read for read in asked if read.axis == axis]
        row = graph.fresh(f"{name}/row")
        graph.shapes[row] = _with_one(graph.shape(name), axis)
        if name in graph.dtypes:
            graph.dtypes[row] = graph.dtypes[name]
        yield Node("Slice", (name, *places), (row,), scope=readers[0].node.scope)
        for read in readers:
            inputs = list(read.node.inputs)
            inputs[read.number] = row
            read.node.inputs = tuple(inputs)


def _row_operands(graph: Graph, node: Node, axis: int) -> Mapping[int, int] | None:
    """Inputs that have the rows of a node's result: their numbers, and along which axis.

    None where the node does not treat rows along ``axis`` of its result alike and apart.
    """
    if len(node.outputs) != 1 or node.outputs[0] not in graph.shapes:
        return None
    result = graph.shape(node.outputs[0])
    if node.op in _ALONE:
        return {0: axis}
    if node.op in _TOGETHER:
        return _broadcast(graph, node, result, axis)
    if node.op in _ALONG:
        return {0: axis} if axis < _whole_axis(node, result, default=-1) else None
    if node.op in _PRODUCTS:
        first = len(graph.shape(node.inputs[0]))
        is_row = axis == len(result) - 2 and first == len(result)
        return {0: axis} if is_row and not node.attributes.get("transA", 0) else None
    if node.op == "Transpose":
        order = node.attributes.get("perm")
        return {0: int(order[axis])} if isinstance(order, tuple) else None
    if node.op == "Reshape":
        return {0: axis} if _keeps_rows(graph, node, axis) else None
    return None


def _broadcast(graph: Graph, node: Node, result: Shape, axis: int) -> Mapping[int, int] | None:
    """Operands that have a row for each of the result's, the others have one for all."""
    operands: dict[int, int] = {}
    for number, name in enumerate(node.inputs):
        if name not in graph.shapes and name not in graph.constants:
            return None
        shape = graph.shape(name)
        place = axis - (len(result) - len(shape))
        if place < 0 or shape[place] == 1:
            continue
        if shape[place] != result[axis]:
            return None
        operands[number] = place
    return operands


def _keeps_rows(graph: Graph, node: Node, axis: int) -> bool:
    """Whether a reshape leaves the axes up to that of the rows as they are."""
    x, target = node.inputs
    if target not in graph.constants or node.inputs[0] not in graph.shapes:
        return False
    before, after = graph.shape(x), graph.shape(node.outputs[0])
    wanted = int(graph.constants[target][axis])
    is_kept = wanted == 0 and not node.attributes.get("allowzero", 0)
    return before[: axis + 1] == after[: axis + 1] and (is_kept or wanted in (-1, after[axis]))


def _shrink(graph: Graph, node: Node, axis: int) -> None:
    """Give a node's result one row, in its shape and in the target of a reshape."""
    name = node.outputs[0]
    if node.op == "Reshape":
        target = [int(n) for n in graph.constants[node.inputs[1]]]
        target[axis] = min(target[axis], 1)
        node.inputs = (node.inputs[0], graph.ints(*target))
    graph.shapes[name] = _with_one(graph.shape(name), axis)


def _with_one(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _whole_axis(node: Node, shape: Shape, *, default: int) -> int:
    axis = node.attributes.get("axis", default)
    assert isinstance(axis, int)
    return axis % len(shape)
