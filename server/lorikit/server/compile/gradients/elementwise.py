# SPDX-License-Identifier: Apache-2.0
"""Gradient rules of arithmetic and activations, value by value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorikit.server.compile.gradients.parts import (
    Rule,
    again,
    beside,
    is_made_again,
    like,
    reduced_to,
    unsupported,
)
from lorikit.server.compile.graph import Graph, Node


def add(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Any number of terms: each takes the gradient, summed where it was broadcast."""
    return [
        reduced_to(graph, dy, name) if need else None
        for name, need in zip(node.inputs, needs, strict=True)
    ]


def sub(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Difference a - b."""
    a, b = node.inputs
    da = reduced_to(graph, dy, a) if needs[0] else None
    if not needs[1]:
        return [da, None]
    reduced = reduced_to(graph, dy, b)
    return [da, like(graph, "Neg", reduced, like=b)]


def mul(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Product a b; each factor takes the gradient times the other one.

    What has to be made again comes second, when the first factor may be released already.
    """
    gradients: list[str | None] = [None, None]
    for index in sorted((0, 1), key=lambda i: is_made_again(graph, node.inputs[1 - i])):
        if needs[index]:
            other = again(graph, node.inputs[1 - index])
            product = like(graph, "Mul", dy, other, like=dy)
            gradients[index] = reduced_to(graph, product, node.inputs[index])
    return gradients


def div(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Quotient y = a / b, with db = -dy y / b."""
    a, b = node.inputs
    da = reduced_to(graph, like(graph, "Div", dy, b, like=dy), a) if needs[0] else None
    if not needs[1]:
        return [da, None]
    product = like(graph, "Mul", dy, node.outputs[0], like=dy)
    reduced = reduced_to(graph, like(graph, "Div", product, b, like=dy), b)
    return [da, like(graph, "Neg", reduced, like=b)]


def power(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """x^p with a constant p: p x^(p-1)."""
    x, exponent = node.inputs
    if exponent not in graph.constants or graph.constants[exponent].size != 1:
        raise unsupported(node, "with a computed exponent")
    p = float(graph.constants[exponent].item())
    base = x if p == 2 else like(graph, "Pow", x, graph.floats(p - 1), like=x)
    slope = like(graph, "Mul", base, graph.floats(p), like=x)
    return [like(graph, "Mul", dy, slope, like=x), None]


def where(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The chosen branch takes the gradient, the other one zero."""
    condition, a, b = node.inputs
    da = db = None
    if needs[1]:
        da = reduced_to(graph, _masked(graph, condition, dy), a)
    if needs[2]:
        other = graph.emit("Not", condition, shape=graph.shape(condition))
        db = reduced_to(graph, _masked(graph, other, dy), b)
    return [None, da, db]


def _masked(graph: Graph, mask: str, value: str) -> str:
    """A value where a mask holds, else zero.

    A product, since the kernel of ``Where`` asks for two more buffers of the size of its result.
    """
    factor = graph.emit("Cast", mask, shape=graph.shape(mask), to=1)
    return like(graph, "Mul", value, factor, like=value)


def negate(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """-x."""
    return [like(graph, "Neg", dy, like=dy)]


def exponential(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is the result."""
    return [like(graph, "Mul", dy, node.outputs[0], like=dy)]


def logarithm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is 1 / x."""
    return [like(graph, "Div", dy, node.inputs[0], like=dy)]


def absolute(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is the sign."""
    return [like(graph, "Mul", dy, like(graph, "Sign", node.inputs[0], like=dy), like=dy)]


def square_root(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is 1 / (2 y)."""
    half = like(graph, "Mul", dy, graph.floats(0.5), like=dy)
    return [like(graph, "Div", half, node.outputs[0], like=dy)]


def reciprocal(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is -y^2."""
    y = node.outputs[0]
    square = like(graph, "Mul", y, y, like=y)
    return [like(graph, "Neg", like(graph, "Mul", dy, square, like=y), like=y)]


def erf(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is 2 / sqrt(pi) exp(-x^2)."""
    x = node.inputs[0]
    bell = _bell(graph, x, -1.0)
    slope = like(graph, "Mul", bell, graph.floats(2 / math.sqrt(math.pi)), like=x)
    return [like(graph, "Mul", dy, slope, like=x)]


def tanh(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is 1 - y^2."""
    y = node.outputs[0]
    square = like(graph, "Mul", y, y, like=y)
    slope = like(graph, "Sub", graph.floats(1.0), square, like=y)
    return [like(graph, "Mul", dy, slope, like=y)]


def sigmoid(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is y (1 - y)."""
    y = node.outputs[0]
    rest = like(graph, "Sub", graph.floats(1.0), y, like=y)
    slope = like(graph, "Mul", rest, y, like=y)
    return [like(graph, "Mul", dy, slope, like=y)]


def relu(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Gradient where the result is positive; a mask is kept, not the result."""
    first = len(graph.nodes)
    mask = like(graph, "Greater", node.outputs[0], graph.floats(0.0), like=dy)
    graph.dtypes[mask] = np.dtype(np.bool_)
    beside(graph, node, first)
    return [_masked(graph, mask, dy)]


def clip(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Gradient where the result lies strictly between the bounds; a mask is kept."""
    first = len(graph.nodes)
    sides = []
    for op, bound in zip(("Greater", "Less"), node.inputs[1:], strict=False):
        if bound:
            sides.append(like(graph, op, node.outputs[0], bound, like=dy))
    if not sides:
        return [dy, *[None] * (len(node.inputs) - 1)]
    mask = sides[0] if len(sides) == 1 else like(graph, "And", *sides, like=dy)
    graph.dtypes.update(dict.fromkeys([*sides, mask], np.dtype(np.bool_)))
    beside(graph, node, first)
    return [_masked(graph, mask, dy), *[None] * (len(node.inputs) - 1)]


def hard_swish(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Slope of x h(x), h = clip(x / 6 + 1 / 2, 0, 1): h, and x / 6 more where not clipped."""
    x = node.inputs[0]
    gate = graph.emit("HardSigmoid", x, shape=graph.shape(x), alpha=1 / 6, beta=0.5)
    size = like(graph, "Abs", x, like=x)
    inside = like(graph, "Less", size, graph.floats(3.0), like=x)
    graph.dtypes[inside] = np.dtype(np.bool_)
    ramp = like(graph, "Mul", x, graph.floats(1 / 6), like=x)
    more = _masked(graph, inside, ramp)
    return [like(graph, "Mul", dy, like(graph, "Add", gate, more, like=x), like=x)]


def hard_sigmoid(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The slope is alpha where the result lies strictly between 0 and 1."""
    y = node.outputs[0]
    distance = like(graph, "Abs", like(graph, "Sub", y, graph.floats(0.5), like=y), like=y)
    inside = like(graph, "Less", distance, graph.floats(0.5), like=y)
    graph.dtypes[inside] = np.dtype(np.bool_)
    alpha = node.attributes.get("alpha", 0.2)
    assert isinstance(alpha, float)
    scaled = like(graph, "Mul", dy, graph.floats(alpha), like=y)
    return [_masked(graph, inside, scaled)]


def gelu(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """From the input alone; both forms, exact and with tanh."""
    x = node.inputs[0]
    exact = node.attributes.get("approximate", "none") == "none"
    slope = _exact_gelu_slope(graph, x) if exact else _tanh_gelu_slope(graph, x)
    return [like(graph, "Mul", dy, slope, like=x)]


def _exact_gelu_slope(graph: Graph, x: str) -> str:
    """d/dx [x P(x)] = P(x) + x p(x), P and p of the standard normal distribution."""
    bell = like(graph, "Mul", _bell(graph, x, -0.5), x, like=x)
    density = like(graph, "Mul", bell, graph.floats(1 / math.sqrt(2 * math.pi)), like=x)
    scaled = like(graph, "Mul", x, graph.floats(1 / math.sqrt(2)), like=x)
    half = like(graph, "Mul", like(graph, "Erf", scaled, like=x), graph.floats(0.5), like=x)
    cumulative = like(graph, "Add", half, graph.floats(0.5), like=x)
    return like(graph, "Add", cumulative, density, like=x)


def _tanh_gelu_slope(graph: Graph, x: str) -> str:
    """With u = a (x + b x^3) and t = tanh(u): 1/2 (1 + t) + 1/2 x (1 - t^2) a (1 + 3 b x^2).

    Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2.
    """
    a, b = math.sqrt(2 / math.pi), 0.044715
    square = like(graph, "Mul", x, x, like=x)
    cubic = like(graph, "Mul", square, graph.floats(a * b), like=x)
    inner = like(graph, "Mul", like(graph, "Add", cubic, graph.floats(a), like=x), x, like=x)
    t = like(graph, "Tanh", inner, like=x)
    slope = like(graph, "Mul", square, graph.floats(3 * a * b), like=x)
    slope = like(graph, "Mul", like(graph, "Add", slope, graph.floats(a), like=x), x, like=x)
    # 1/2 (1 + t) (1 + (1 - t) x u'(x)) is the same with one factor taken out.
    rest = like(graph, "Sub", graph.floats(1.0), t, like=x)
    product = like(graph, "Mul", slope, rest, like=x)
    outer = like(graph, "Add", product, graph.floats(1.0), like=x)
    half = like(graph, "Mul", t, graph.floats(0.5), like=x)
    gate = like(graph, "Add", half, graph.floats(0.5), like=x)
    return like(graph, "Mul", outer, gate, like=x)


def _bell(graph: Graph, x: str, factor: float) -> str:
    """exp(factor x^2)."""
    square = like(graph, "Mul", x, x, like=x)
    return like(graph, "Exp", like(graph, "Mul", square, graph.floats(factor), like=x), like=x)


def swish(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """With s the sigmoid and y = x s: s + y (1 - s), both computed again from x."""
    if node.attributes.get("alpha", 1.702) != 1.0:
        raise unsupported(node, "with alpha other than 1")
    x = node.inputs[0]
    s = like(graph, "Sigmoid", x, like=x)
    y = like(graph, "Mul", x, s, like=x)
    rest = like(graph, "Sub", graph.floats(1.0), s, like=x)
    slope = like(graph, "Add", like(graph, "Mul", rest, y, like=x), s, like=x)
    return [like(graph, "Mul", dy, slope, like=x)]


def dropout(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """The same values are dropped from the gradient; the mask is made again."""
    dx = like(graph, node.op, dy, like=dy)
    graph.nodes[-1].attributes = dict(node.attributes)
    return [dx]


RULES: dict[str, Rule] = {
    "Abs": absolute,
    "Add": add,
    "Clip": clip,
    "Div": div,
    "Erf": erf,
    "Exp": exponential,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Log": logarithm,
    "LoraDropout": dropout,
    "Mul": mul,
    "Neg": negate,
    "Pow": power,
    "QuickGelu": swish,
    "Reciprocal": reciprocal,
    "Relu": relu,
    "Sigmoid": sigmoid,
    "Sqrt": square_root,
    "Sub": sub,
    "Sum": add,
    "Tanh": tanh,
    "Where": where,
}
"""Rule by operator."""
