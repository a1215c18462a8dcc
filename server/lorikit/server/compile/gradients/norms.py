# SPDX-License-Identifier: Apache-2.0
"""Gradient rules of normalisations, softmax and the reductions they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorikit.server.compile.gradients.parts import (
    Rule,
    axis_of,
    expanded,
    integers,
    length,
    like,
    reduced_to,
    reshaped,
    unsupported,
)
from lorikit.server.compile.graph import Graph, Node, Shape


def softmax(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Emit dx = y dy - y sum(y dy), which writes over dy and y once they are read."""
    y = node.outputs[0]
    axis = axis_of(graph, node, y, -1)
    product = like(graph, "Mul", dy, y, like=y)
    row: Shape = tuple(1 if i == axis else n for i, n in enumerate(graph.shape(y)))
    total = graph.emit("ReduceSum", product, graph.ints(axis), shape=row, keepdims=1)
    return [like(graph, "Sub", product, like(graph, "Mul", y, total, like=y), like=y)]


def log_softmax(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Emit dx = dy - exp(y) sum(dy)."""
    y = node.outputs[0]
    axis = axis_of(graph, node, y, -1)
    row: Shape = tuple(1 if i == axis else n for i, n in enumerate(graph.shape(y)))
    total = graph.emit("ReduceSum", dy, graph.ints(axis), shape=row, keepdims=1)
    probabilities = like(graph, "Exp", y, like=y)
    share = like(graph, "Mul", probabilities, total, like=y)
    return [like(graph, "Sub", dy, share, like=y)]


def layer_norm_statistics(graph: Graph, node: Node) -> tuple[str, str]:
    """Let a forward LayerNormalization also return its mean and inverse deviation; their names."""
    if len(node.outputs) == 1:
        statistics = (graph.fresh("mean"), graph.fresh("inverse_deviation"))
        node.outputs = (node.outputs[0], *statistics)
        graph.shapes.update(dict.fromkeys(statistics, _row_shape(graph, node)))
    return node.outputs[1], node.outputs[2]


def _row_shape(graph: Graph, node: Node) -> Shape:
    shape = graph.shape(node.inputs[0])
    if node.attributes.get("axis", -1) not in (-1, len(shape) - 1):
        raise unsupported(node, "over several axes")
    return (*shape[:-1], 1)


def layer_norm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """With xhat = (x - mean) r and g = dy w: dx = r (g - mean(g) - xhat mean(g xhat))."""
    x, weight = node.inputs[:2]
    row = _row_shape(graph, node)
    gradients: list[str | None] = [None] * len(node.inputs)
    if needs[0] or needs[1]:
        mean, inverse = layer_norm_statistics(graph, node)
        centred = like(graph, "Sub", x, mean, like=x)
        xhat = like(graph, "Mul", centred, inverse, like=x)
    if needs[1]:
        gradients[1] = reduced_to(graph, like(graph, "Mul", dy, xhat, like=x), weight)
    if len(needs) > 2 and needs[2]:
        gradients[2] = reduced_to(graph, dy, node.inputs[2])
    if needs[0]:
        g = like(graph, "Mul", dy, weight, like=x)
        axis = graph.ints(-1)
        mean_g = graph.emit("ReduceMean", g, axis, shape=row, keepdims=1)
        rest = _decorrelated(graph, like(graph, "Sub", g, mean_g, like=x), xhat, row)
        gradients[0] = like(graph, "Mul", rest, inverse, like=x)
    return gradients


def rms_norm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """With xhat = x r and g = dy w: dx = r (g - xhat mean(g xhat))."""
    x, weight = node.inputs
    row = _row_shape(graph, node)
    if len(node.outputs) == 1:
        node.outputs = (node.outputs[0], graph.fresh("inverse_deviation"))
        graph.shapes[node.outputs[1]] = row
    inverse = node.outputs[1]
    xhat = like(graph, "Mul", x, inverse, like=x)
    dx = dw = None
    if needs[1]:
        dw = reduced_to(graph, like(graph, "Mul", dy, xhat, like=x), weight)
    if needs[0]:
        rest = _decorrelated(graph, like(graph, "Mul", dy, weight, like=x), xhat, row)
        dx = like(graph, "Mul", rest, inverse, like=x)
    return [dx, dw]


def _decorrelated(graph: Graph, g: str, xhat: str, row: Shape) -> str:
    """Emit g - xhat mean(g xhat); as mean(xhat) is 0 in a layer norm, g may be centred before."""
    product = like(graph, "Mul", g, xhat, like=g)
    mean = graph.emit("ReduceMean", product, graph.ints(-1), shape=row, keepdims=1)
    return like(graph, "Sub", g, like(graph, "Mul", xhat, mean, like=g), like=g)


def batch_norm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """With fixed statistics: a scale and a shift by channel, so backward is the same operator."""
    if node.attributes.get("training_mode", 0):
        raise unsupported(node, "in training mode (freeze the statistics with eval())")
    x, scale, _, mean, variance = node.inputs
    if needs[3] or needs[4]:
        raise unsupported(node, "with trained statistics")
    channels = graph.shape(scale)[0]
    assert isinstance(channels, int)
    zero, one = (_filled(graph, channels, value) for value in (0.0, 1.0))
    axes = graph.ints(0, *range(2, len(graph.shape(x))))
    gradients: list[str | None] = [None] * 5
    if needs[0]:
        gradients[0] = _fixed_norm(graph, node, dy, scale, zero, zero, variance)
    if needs[1]:
        xhat = _fixed_norm(graph, node, x, one, zero, mean, variance)
        product = like(graph, "Mul", dy, xhat, like=x)
        gradients[1] = graph.emit("ReduceSum", product, axes, shape=(channels,), keepdims=0)
    if needs[2]:
        gradients[2] = graph.emit("ReduceSum", dy, axes, shape=(channels,), keepdims=0)
    return gradients


def _fixed_norm(graph: Graph, node: Node, *inputs: str) -> str:
    """The same normalisation of other values."""
    shape = graph.shape(node.inputs[0])
    epsilon = node.attributes.get("epsilon", 1e-5)
    return graph.emit("BatchNormalization", *inputs, shape=shape, epsilon=epsilon)


def _filled(graph: Graph, count: int, value: float) -> str:
    """A constant vector of equal values, shared by all who need it."""
    name = f"filled:{value}:{count}"
    graph.constants.setdefault(name, np.full(count, value, np.float32))
    return name


def reduce_sum(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Every summand takes the gradient of its sum."""
    wide = _spread(graph, node, dy, _axes(graph, node))
    return [expanded(graph, wide, node.inputs[0]), *[None] * (len(node.inputs) - 1)]


def reduce_mean(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Every value takes the gradient of its mean divided by how many there are."""
    x = node.inputs[0]
    axes = _axes(graph, node)
    share = like(graph, "Div", dy, _count(graph, x, axes), like=dy)
    wide = _spread(graph, node, share, axes)
    return [expanded(graph, wide, x), *[None] * (len(node.inputs) - 1)]


def reduce_l2(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Norm y = |x|: dx = x dy / y."""
    x = node.inputs[0]
    ratio = like(graph, "Div", dy, node.outputs[0], like=dy)
    wide = _spread(graph, node, ratio, _axes(graph, node))
    return [like(graph, "Mul", x, wide, like=x), *[None] * (len(node.inputs) - 1)]


def global_average(
    graph: Graph, node: Node, dy: str, needs: Sequence[bool]
) -> Sequence[str | None]:
    """Mean over all spatial axes, which stay with length 1."""
    x = node.inputs[0]
    axes = list(range(2, len(graph.shape(x))))
    share = like(graph, "Div", dy, _count(graph, x, axes), like=dy)
    return [expanded(graph, share, x)]


def _axes(graph: Graph, node: Node) -> list[int]:
    """Axes that a reduction reduces, counted from the front."""
    rank = len(graph.shape(node.inputs[0]))
    given = node.attributes.get("axes")
    if isinstance(given, tuple):
        return [int(axis) % rank for axis in given]
    if len(node.inputs) > 1 and node.inputs[1]:
        axes = integers(graph, node, 1)
        if axes or node.attributes.get("noop_with_empty_axes", 0):
            return [axis % rank for axis in axes]
    elif node.attributes.get("noop_with_empty_axes", 0):
        return []
    return list(range(rank))


def _spread(graph: Graph, node: Node, dy: str, axes: Sequence[int]) -> str:
    """The gradient of a reduction with the reduced axes back, of length 1."""
    if node.attributes.get("keepdims", 1) or not axes:
        return dy
    shape = tuple(1 if i in axes else n for i, n in enumerate(graph.shape(node.inputs[0])))
    return graph.emit("Unsqueeze", dy, graph.ints(*axes), shape=shape)


def _count(graph: Graph, x: str, axes: Sequence[int]) -> str:
    """How many values a mean is taken of, as a float scalar."""
    shape = graph.shape(x)
    fixed = [int(n) for n in (shape[axis] for axis in axes) if isinstance(n, int)]
    count = graph.floats(float(np.prod(fixed, dtype=np.int64)))
    for axis in axes:
        if not isinstance(shape[axis], int):
            symbol = reshaped(graph, length(graph, x, axis), ())
            number = graph.emit("Cast", symbol, shape=(), to=1)
            count = graph.emit("Mul", count, number, shape=())
    return count


RULES: dict[str, Rule] = {
    "BatchNormalization": batch_norm,
    "GlobalAveragePool": global_average,
    "LayerNormalization": layer_norm,
    "LogSoftmax": log_softmax,
    "ReduceL2": reduce_l2,
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum,
    "SimplifiedLayerNormalization": rms_norm,
    "Softmax": softmax,
}
"""Rule by operator."""
