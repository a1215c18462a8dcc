# SPDX-License-Identifier: Apache-2.0
"""Gradient rules of operators that move values without changing them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from lorikit.server.compile.gradients.parts import (
    Rule,
    axis_of,
    integers,
    join,
    length,
    reduced_to,
    reshaped,
    unsupported,
    zeros,
)
from lorikit.server.compile.graph import Dim, Graph, Node, Shape

_END = 2**31 - 1
"""An end of a slice from here on means the end of the axis, whatever its length."""


def identity(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The gradient as it is; also of ``Split``, whose parts' gradients come joined."""
    return [dy, *[None] * (len(node.inputs) - 1)]


def cast(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Between floating-point types only; gradients are float32 throughout."""
    target = node.attributes.get("to")
    return [dy if target in (1, 10, 11) else None]


def reshape(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Reshape, Squeeze, Unsqueeze and Flatten: the gradient takes the input's shape back."""
    back = reshaped(graph, dy, graph.shape(node.inputs[0]), node.inputs[0])
    return [back, *[None] * (len(node.inputs) - 1)]


def transpose(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The inverse order of axes."""
    x = node.inputs[0]
    order = node.attributes.get("perm", tuple(reversed(range(len(graph.shape(x))))))
    assert isinstance(order, tuple)
    inverse = tuple(int(i) for i in np.argsort(order))
    return [graph.emit("Transpose", dy, shape=graph.shape(x), perm=inverse)]


def expand(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Sum over the axes that were repeated."""
    return [reduced_to(graph, dy, node.inputs[0]), None]


def tile(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Sum over the copies; all lengths but one are fixed."""
    source, target = graph.shape(node.inputs[0]), graph.shape(dy)
    copies: list[Dim] = []
    for n, total in zip(source, target, strict=True):
        if not isinstance(n, int):
            if n != total:
                raise unsupported(node, f"along an axis of length {n}")
            copies.append(1)
        else:
            copies.append(total // n if isinstance(total, int) else "copies")
    split: Shape = tuple(n for pair in zip(copies, source, strict=True) for n in pair)
    apart = reshaped(graph, dy, split)
    axes = graph.ints(*(2 * i for i, n in enumerate(copies) if n != 1))
    summed = graph.emit("ReduceSum", apart, axes, shape=source, keepdims=0)
    return [reshaped(graph, summed, source), None]


def concat(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Each part takes its slice."""
    axis = axis_of(graph, node, dy, 0)
    gradients: list[str | None] = []
    for index, (name, need) in enumerate(zip(node.inputs, needs, strict=True)):
        if not need:
            gradients.append(None)
            continue
        start = _total(graph, node.inputs[:index], axis)
        last = index == len(node.inputs) - 1
        end = graph.ints(2**63 - 1) if last else _total(graph, node.inputs[: index + 1], axis)
        place = (start, end, graph.ints(axis))
        gradients.append(graph.emit("Slice", dy, *place, shape=graph.shape(name)))
    return gradients


def slice_(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Zeros where nothing was taken."""
    x = node.inputs[0]
    shape = graph.shape(x)
    starts, ends = integers(graph, node, 1), integers(graph, node, 2)
    axes = integers(graph, node, 3) if len(node.inputs) > 3 else list(range(len(starts)))
    axes = [axis % len(shape) for axis in axes]
    if len(node.inputs) > 4 and set(integers(graph, node, 4)) != {1}:
        raise unsupported(node, "with steps")
    before = [_before(graph, x, axis, n) for axis, n in zip(axes, starts, strict=True)]
    after = [_after(graph, x, axis, n) for axis, n in zip(axes, ends, strict=True)]
    padded = _padded(graph, dy, before, after, axes, shape)
    return [padded, *[None] * (len(node.inputs) - 1)]


def gather(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Put dy where values were taken from; a value taken twice gets the sum."""
    x, index = node.inputs
    shape = graph.shape(x)
    axis = axis_of(graph, node, x, 0)
    if index in graph.constants and graph.constants[index].ndim == 0:
        position = int(graph.constants[index])
        wide = graph.emit("Unsqueeze", dy, graph.ints(axis), shape=_single(shape, axis))
        before = _before(graph, x, axis, position)
        after = _after(graph, x, axis, position + 1 if position != -1 else _END)
        return [_padded(graph, wide, [before], [after], [axis], shape), None]
    if axis != 0:
        raise unsupported(node, f"of several indices along axis {axis}")
    place: Shape = (*graph.shape(index), 1)
    places = graph.emit("Unsqueeze", index, graph.ints(-1), shape=place)
    target = zeros(graph, x)
    return [graph.emit("ScatterND", target, places, dy, shape=shape, reduction="add"), None]


def gather_elements(
    graph: Graph, node: Node, dy: str, needs: Sequence[bool]
) -> Sequence[str | None]:
    """Each value goes back to where it was taken from, and adds up there."""
    x, index = node.inputs
    axis = axis_of(graph, node, x, 0)
    target = zeros(graph, x)
    back = graph.emit(
        "ScatterElements", target, index, dy, shape=graph.shape(x), axis=axis, reduction="add"
    )
    return [back, None]


def pad(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The middle of the gradient; padding with a constant only."""
    if node.attributes.get("mode", "constant") != "constant" or len(node.inputs) > 3:
        raise unsupported(node, "by values of its input or along chosen axes")
    x = node.inputs[0]
    pads = integers(graph, node, 1)
    rank = len(graph.shape(x))
    starts = graph.ints(*pads[:rank])
    ends = graph.ints(*(-n if n else 2**63 - 1 for n in pads[rank:]))
    middle = graph.emit("Slice", dy, starts, ends, graph.ints(*range(rank)), shape=graph.shape(x))
    return [middle, *[None] * (len(node.inputs) - 1)]


def rotary(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """A rotation; the gradient is turned back by the same angles."""
    _, position, cosine, sine = node.inputs
    back = graph.emit("Neg", sine, shape=graph.shape(sine))
    dx = graph.emit(
        "RotaryEmbedding", dy, position, cosine, back, shape=graph.shape(dy), domain=node.domain
    )
    graph.nodes[-1].attributes = dict(node.attributes)
    return [dx, None, None, None]


def _single(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _before(graph: Graph, x: str, axis: int, start: int) -> str:
    """How many values lie before a slice of x that starts at ``start``, as a vector of one."""
    size = graph.shape(x)[axis]
    if start >= 0:
        return graph.ints(min(start, size) if isinstance(size, int) else start)
    if isinstance(size, int):
        return graph.ints(max(0, size + start))
    return graph.emit("Add", length(graph, x, axis), graph.ints(start), shape=(1,))


def _after(graph: Graph, x: str, axis: int, end: int) -> str:
    """How many values lie behind a slice of x that ends at ``end``, as a vector of one."""
    size = graph.shape(x)[axis]
    if end < 0:
        return graph.ints(-end)
    if end >= _END:
        return graph.ints(0)
    if isinstance(size, int):
        return graph.ints(max(0, size - end))
    return graph.emit("Sub", length(graph, x, axis), graph.ints(end), shape=(1,))


def _padded(
    graph: Graph,
    value: str,
    before: Sequence[str],
    after: Sequence[str],
    axes: Sequence[int],
    shape: Shape,
) -> str:
    """Put zeros around a value."""
    parts = [*before, *after]
    if all(name in graph.constants for name in parts):
        counts = [int(graph.constants[name][0]) for name in parts]
        if not any(counts):
            return value
        pads = graph.ints(*counts)
    else:
        pads = join(graph, parts)
    return graph.emit("Pad", value, pads, graph.floats(0.0), graph.ints(*axes), shape=shape)


def _total(graph: Graph, names: Sequence[str], axis: int) -> str:
    """Sum of the lengths of values along an axis, as a vector of one."""
    sizes = [length(graph, name, axis) for name in names]
    fixed = sum(int(graph.constants[name][0]) for name in sizes if name in graph.constants)
    computed = [name for name in sizes if name not in graph.constants]
    if fixed or not computed:
        computed.append(graph.ints(fixed))
    return reduce(lambda a, b: graph.emit("Add", a, b, shape=(1,)), computed)


RULES: dict[str, Rule] = {
    "Cast": cast,
    "Concat": concat,
    "Expand": expand,
    "Flatten": reshape,
    "Gather": gather,
    "GatherElements": gather_elements,
    "Identity": identity,
    "Pad": pad,
    "Reshape": reshape,
    "RotaryEmbedding": rotary,
    "Slice": slice_,
    "Split": identity,
    "Squeeze": reshape,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": reshape,
}
"""Rule by operator."""
