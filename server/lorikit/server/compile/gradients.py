# SPDX-License-Identifier: Apache-2.0
"""Reverse-mode differentiation of a graph.

Only what lies between the trained tensors and the loss is differentiated, so backward stops at the
lowest trained layer by itself. Each operator has one rule that emits the vector-Jacobian product
with standard operators (and ``FusedMatMul``); a rule reads forward values by name, and what no
rule reads is free to be released.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port, Shape, dependents
from lorikit.server.errors import UnsupportedModelError

Rule = Callable[[Graph, Node, str, Sequence[bool]], Sequence[str | None]]
"""(graph, node, gradient of its first output, which inputs need one) -> gradient by input."""


def add_gradients(
    graph: Graph,
    seeds: Mapping[str, str],
    trained: Sequence[str],
    rules: Mapping[str, Rule] | None = None,
) -> None:
    """Append the backward pass and an output ``<name>.grad`` for each trained input.

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
    collected: dict[str, list[str]] = {name: [gradient] for name, gradient in seeds.items()}
    for node in reversed(forward):
        if node.outputs[0] not in collected or node.outputs[0] not in wanted:
            continue
        incoming = _sum(graph, node.outputs[0], collected.pop(node.outputs[0]))
        needs = [name in wanted for name in node.inputs]
        rule = (rules or RULES).get(node.op)
        if rule is None:
            raise UnsupportedModelError(
                f"operator {node.op} ({node.scope or 'no scope'}) has no gradient rule; "
                "one in compile/gradients.py would be needed"
            )
        first = len(graph.nodes)
        gradients = rule(graph, node, incoming, needs)
        for emitted in graph.nodes[first:]:
            emitted.scope = node.scope
        for name, gradient, need in zip(node.inputs, gradients, needs, strict=True):
            if need and gradient is not None:
                collected.setdefault(name, []).append(gradient)
    for name in trained:
        if name not in collected:
            raise UnsupportedModelError(f"{name} has no effect on the loss, so it cannot train")
        gradient = _sum(graph, name, collected[name])
        graph.nodes.append(Node("Identity", (gradient,), (f"{name}.grad",)))
        graph.shapes[f"{name}.grad"] = graph.shape(name)
        graph.outputs.append(Port(f"{name}.grad", np.dtype(np.float32), graph.shape(name)))


def _sum(graph: Graph, name: str, gradients: Sequence[str]) -> str:
    total = gradients[0]
    for gradient in gradients[1:]:
        total = graph.emit("Add", total, gradient, shape=graph.shape(name), hint="grad")
    return total


def _reduced_to(graph: Graph, gradient: str, operand: str) -> str:
    """Sum a gradient over the axes along which the operand was broadcast."""
    source, target = graph.shape(gradient), graph.shape(operand)
    extra = len(source) - len(target)
    axes = [*range(extra)]
    axes += [extra + i for i, n in enumerate(target) if n == 1 and source[extra + i] != 1]
    if not axes:
        return gradient
    kept = tuple(1 if i in axes else n for i, n in enumerate(source))
    summed = graph.emit("ReduceSum", gradient, graph.ints(*axes), shape=kept, keepdims=1)
    if extra == 0:
        return summed
    return graph.emit("Squeeze", summed, graph.ints(*range(extra)), shape=target)


def _like(graph: Graph, op: str, *inputs: str, like: str) -> str:
    """Emit a node whose result has the shape of ``like``."""
    return graph.emit(op, *inputs, shape=graph.shape(like))


def _matmul(graph: Graph, a: str, b: str, shape: Shape, *, ta: int = 0, tb: int = 0) -> str:
    if not ta and not tb:
        return graph.emit("MatMul", a, b, shape=shape)
    return graph.emit(
        "FusedMatMul", a, b, shape=shape, domain=MICROSOFT, transA=ta, transB=tb, alpha=1.0
    )


def _rows(graph: Graph, name: str) -> str:
    """The value as a matrix: all axes but the last folded into rows."""
    shape = graph.shape(name)
    if len(shape) == 2:
        return name
    folded: Shape = ("rows", shape[-1])
    return (
        graph.emit("Reshape", name, graph.ints(-1, int(shape[-1])), shape=folded)
        if isinstance(shape[-1], int)
        else _rows_of_unknown_width(graph, name)
    )


def _rows_of_unknown_width(graph: Graph, name: str) -> str:
    """As ``_rows`` where the last length is a symbol, such as a rank."""
    shape = graph.shape(name)
    last = graph.emit("Shape", name, shape=(1,), start=len(shape) - 1)
    target = graph.emit("Concat", graph.ints(-1), last, shape=(2,), axis=0)
    return graph.emit("Reshape", name, target, shape=("rows", shape[-1]))


def _add(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    return [_reduced_to(graph, dy, name) if need else None for name, need in _pairs(node, needs)]


def _sub(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    a, b = node.inputs
    da = _reduced_to(graph, dy, a) if needs[0] else None
    db = _reduced_to(graph, _like(graph, "Neg", dy, like=dy), b) if needs[1] else None
    return [da, db]


def _mul(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    a, b = node.inputs
    da = _reduced_to(graph, _like(graph, "Mul", dy, b, like=dy), a) if needs[0] else None
    db = _reduced_to(graph, _like(graph, "Mul", dy, a, like=dy), b) if needs[1] else None
    return [da, db]


def _div(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    a, b = node.inputs
    da = _reduced_to(graph, _like(graph, "Div", dy, b, like=dy), a) if needs[0] else None
    if not needs[1]:
        return [da, None]
    slope = _like(graph, "Div", node.outputs[0], b, like=dy)
    product = _like(graph, "Mul", dy, slope, like=dy)
    return [da, _reduced_to(graph, _like(graph, "Neg", product, like=dy), b)]


def _fused_matmul(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """A linear map y = x W^T, W [out, in] (the form ``fuse_linear`` makes)."""
    x, weight = node.inputs
    dx = _matmul(graph, dy, weight, graph.shape(x)) if needs[0] else None
    dw = None
    if needs[1]:
        shape = graph.shape(weight)
        dw = graph.emit("Gemm", _rows(graph, dy), _rows(graph, x), shape=shape, transA=1, transB=0)
    return [dx, dw]


def _plain_matmul(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    a, b = node.inputs
    da = db = None
    if needs[0]:
        da = _reduced_to(graph, _matmul(graph, dy, b, _product(graph, dy, a), tb=1), a)
    if needs[1]:
        db = _reduced_to(graph, _matmul(graph, a, dy, _product(graph, dy, b), ta=1), b)
    return [da, db]


def _product(graph: Graph, dy: str, operand: str) -> Shape:
    """Shape of a batched operand's gradient before broadcasting is undone."""
    return (*graph.shape(dy)[:-2], *graph.shape(operand)[-2:])


def _gemm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Y = x W^T + b as the exporter writes a linear map on matrices."""
    attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **node.attributes}
    if attributes != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}:
        raise UnsupportedModelError(f"Gemm with attributes {attributes} has no gradient rule")
    x, weight = node.inputs[:2]
    gradients: list[str | None] = [None] * len(node.inputs)
    if needs[0]:
        gradients[0] = graph.emit("Gemm", dy, weight, shape=graph.shape(x))
    if needs[1]:
        gradients[1] = graph.emit("Gemm", dy, x, shape=graph.shape(weight), transA=1)
    if len(needs) > 2 and needs[2]:
        gradients[2] = _reduced_to(graph, dy, node.inputs[2])
    return gradients


def _softmax(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    y = node.outputs[0]
    axis = node.attributes.get("axis", -1)
    if axis not in (-1, len(graph.shape(y)) - 1):
        raise UnsupportedModelError(f"Softmax over axis {axis} has no gradient rule")
    product = _like(graph, "Mul", dy, y, like=y)
    row: Shape = (*graph.shape(y)[:-1], 1)
    total = graph.emit("ReduceSum", product, graph.ints(-1), shape=row, keepdims=1)
    return [_like(graph, "Sub", product, _like(graph, "Mul", y, total, like=y), like=y)]


def layer_norm_statistics(graph: Graph, node: Node) -> tuple[str, str]:
    """Let a forward LayerNormalization also return its mean and inverse deviation; their names."""
    if len(node.outputs) == 1:
        statistics = (graph.fresh("mean"), graph.fresh("inverse_deviation"))
        node.outputs = (node.outputs[0], *statistics)
        rows: Shape = (*graph.shape(node.inputs[0])[:-1], 1)
        graph.shapes.update(dict.fromkeys(statistics, rows))
    return node.outputs[1], node.outputs[2]


def _layer_norm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """With xhat = (x - mean) r and g = dy w: dx = r (g - mean(g) - xhat mean(g xhat))."""
    x, weight = node.inputs[:2]
    rows: Shape = (*graph.shape(x)[:-1], 1)
    if node.attributes.get("axis", -1) not in (-1, len(rows) - 1):
        raise UnsupportedModelError("LayerNormalization over several axes has no gradient rule")
    mean, inverse = layer_norm_statistics(graph, node)
    centred = _like(graph, "Sub", x, mean, like=x)
    xhat = _like(graph, "Mul", centred, inverse, like=x)
    gradients: list[str | None] = [None] * len(node.inputs)
    if needs[0]:
        g = _like(graph, "Mul", dy, weight, like=x)
        axis = graph.ints(-1)
        mean_g = graph.emit("ReduceMean", g, axis, shape=rows, keepdims=1)
        product = _like(graph, "Mul", g, xhat, like=x)
        mean_product = graph.emit("ReduceMean", product, axis, shape=rows, keepdims=1)
        shift = _like(graph, "Mul", xhat, mean_product, like=x)
        rest = _like(graph, "Sub", _like(graph, "Sub", g, mean_g, like=x), shift, like=x)
        gradients[0] = _like(graph, "Mul", rest, inverse, like=x)
    if needs[1]:
        gradients[1] = _reduced_to(graph, _like(graph, "Mul", dy, xhat, like=x), weight)
    if len(needs) > 2 and needs[2]:
        gradients[2] = _reduced_to(graph, dy, node.inputs[2])
    return gradients


def _gelu(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Exact form: d/dx [x P(x)] = P(x) + x p(x), P and p of the standard normal distribution."""
    if node.attributes.get("approximate", "none") != "none":
        raise UnsupportedModelError("Gelu with the tanh approximation has no gradient rule")
    x = node.inputs[0]
    scaled = _like(graph, "Mul", x, graph.floats(1 / math.sqrt(2)), like=x)
    erf = _like(graph, "Erf", scaled, like=x)
    half = _like(graph, "Mul", erf, graph.floats(0.5), like=x)
    cumulative = _like(graph, "Add", half, graph.floats(0.5), like=x)
    square = _like(graph, "Mul", scaled, scaled, like=x)
    bell = _like(graph, "Exp", _like(graph, "Neg", square, like=x), like=x)
    density = _like(graph, "Mul", bell, graph.floats(1 / math.sqrt(2 * math.pi)), like=x)
    slope = _like(graph, "Add", cumulative, _like(graph, "Mul", x, density, like=x), like=x)
    return [_like(graph, "Mul", dy, slope, like=x)]


def _tanh(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    y = node.outputs[0]
    square = _like(graph, "Mul", y, y, like=y)
    slope = _like(graph, "Sub", graph.floats(1.0), square, like=y)
    return [_like(graph, "Mul", dy, slope, like=y)]


def _relu(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    y = node.outputs[0]
    positive = _like(graph, "Greater", y, graph.floats(0.0), like=y)
    return [_like(graph, "Where", positive, dy, graph.floats(0.0), like=y)]


def _reshape(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    x = node.inputs[0]
    length = graph.emit("Shape", x, shape=(len(graph.shape(x)),))
    return [_like(graph, "Reshape", dy, length, like=x), *[None] * (len(node.inputs) - 1)]


def _transpose(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    x = node.inputs[0]
    rank = len(graph.shape(x))
    order = node.attributes.get("perm", tuple(reversed(range(rank))))
    assert isinstance(order, tuple)
    inverse = tuple(int(i) for i in np.argsort(order))
    return [graph.emit("Transpose", dy, shape=graph.shape(x), perm=inverse)]


def _gather(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Selection of one index along an axis: the gradient is dy there and zero elsewhere."""
    x, index = node.inputs
    if not needs[0] or index not in graph.constants or graph.constants[index].ndim != 0:
        raise UnsupportedModelError("Gather with computed or several indices has no gradient rule")
    shape = graph.shape(x)
    axis = int(node.attributes.get("axis", 0)) % len(shape)  # type: ignore[arg-type]  # an int
    length = graph.emit("Shape", x, shape=(1,), start=axis, end=axis + 1)
    scalar = graph.emit("Squeeze", length, graph.ints(0), shape=())
    zero, one = (graph.constant(value, np.int64, "int") for value in (0, 1))
    positions = graph.emit("Range", zero, scalar, one, shape=(shape[axis],))
    place = index
    if int(graph.constants[index]) < 0:
        place = graph.emit("Add", scalar, index, shape=())
    hit = graph.emit("Equal", positions, place, shape=(shape[axis],))
    mask = graph.emit("Cast", hit, shape=(shape[axis],), to=1)
    after = range(1, len(shape) - axis)
    column: Shape = (shape[axis], *[1 for _ in after])
    if len(column) > 1:
        mask = graph.emit("Unsqueeze", mask, graph.ints(*after), shape=column)
    spread: Shape = (*shape[:axis], 1, *shape[axis + 1 :])
    wide = graph.emit("Unsqueeze", dy, graph.ints(axis), shape=spread)
    return [graph.emit("Mul", wide, mask, shape=shape), None]


def _cast_shape(op: str) -> Rule:
    """Rule of Squeeze and Unsqueeze: the gradient takes the input's shape back."""

    def rule(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
        back = _like(graph, op, dy, node.inputs[1], like=node.inputs[0])
        return [back, None]

    return rule


def _identity(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    return [dy]


def _pairs(node: Node, needs: Sequence[bool]) -> list[tuple[str, bool]]:
    return list(zip(node.inputs, needs, strict=True))


RULES: dict[str, Rule] = {
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "FusedMatMul": _fused_matmul,
    "MatMul": _plain_matmul,
    "Gemm": _gemm,
    "Softmax": _softmax,
    "LayerNormalization": _layer_norm,
    "Gelu": _gelu,
    "Tanh": _tanh,
    "Relu": _relu,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Gather": _gather,
    "Squeeze": _cast_shape("Unsqueeze"),
    "Unsqueeze": _cast_shape("Squeeze"),
    "Identity": _identity,
}
"""Gradient rule by operator."""
