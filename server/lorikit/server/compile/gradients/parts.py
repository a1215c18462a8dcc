# SPDX-License-Identifier: Apache-2.0
"""What gradient rules are made of: the type of a rule and the pieces that several rules emit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from lorikit.server.compile.graph import MICROSOFT, Dim, Graph, Node, Shape
from lorikit.server.errors import UnsupportedModelError

Rule = Callable[[Graph, Node, str, Sequence[bool]], Sequence[str | None]]
"""(graph, node, gradient of its first output, which inputs need one) -> gradient by input.

A node whose outputs are parts of one value, ``Split``, gets their gradients joined.
"""

_PRODUCT = re.compile(r"(\d+)\*(\w+)")


def like(graph: Graph, op: str, *inputs: str, like: str) -> str:
    """Emit a node whose result has the shape of ``like``."""
    return graph.emit(op, *inputs, shape=graph.shape(like))


def unsupported(node: Node, what: str) -> UnsupportedModelError:
    """The error of a rule that does not cover a form of its operator."""
    return UnsupportedModelError(
        f"{node.op} ({node.scope or 'no scope'}) {what} has no gradient rule; "
        "one in compile/gradients/ would be needed"
    )


def integer(node: Node, name: str, default: int) -> int:
    """An attribute of a node that is an integer."""
    value = node.attributes.get(name, default)
    assert isinstance(value, int)
    return value


def integers(graph: Graph, node: Node, index: int) -> list[int]:
    """Input ``index`` of a node as integers; a constant, else the form has no rule."""
    name = node.inputs[index]
    if name not in graph.constants:
        raise unsupported(node, f"with a computed input {index}")
    return [int(n) for n in np.atleast_1d(graph.constants[name])]


def axis_of(graph: Graph, node: Node, name: str, default: int) -> int:
    """The attribute ``axis`` of a node, counted from the front of the value ``name``."""
    return integer(node, "axis", default) % len(graph.shape(name))


def reduced_to(graph: Graph, gradient: str, operand: str) -> str:
    """Sum a gradient over the axes along which the operand was broadcast."""
    source, target = graph.shape(gradient), graph.shape(operand)
    extra = len(source) - len(target)
    axes = [*range(extra)]
    axes += [extra + i for i, n in enumerate(target) if n == 1 and source[extra + i] != 1]
    if not axes:
        return gradient
    if axes == [*range(extra)]:
        return graph.emit("ReduceSum", gradient, graph.ints(*axes), shape=target, keepdims=0)
    kept = tuple(1 if i in axes else n for i, n in enumerate(source))
    summed = graph.emit("ReduceSum", gradient, graph.ints(*axes), shape=kept, keepdims=1)
    if extra == 0:
        return summed
    return graph.emit("Squeeze", summed, graph.ints(*range(extra)), shape=target)


def matmul(
    graph: Graph, a: str, b: str, shape: Shape, ta: int = 0, tb: int = 0, alpha: float = 1.0
) -> str:
    """``alpha`` times the product of a and b, each transposed in its last two axes if asked."""
    if not ta and not tb and alpha == 1.0:
        return graph.emit("MatMul", a, b, shape=shape)
    return graph.emit(
        "FusedMatMul", a, b, shape=shape, domain=MICROSOFT, transA=ta, transB=tb, alpha=alpha
    )


def rows(graph: Graph, name: str) -> str:
    """The value as a matrix: all axes but the last folded into rows."""
    shape = graph.shape(name)
    if len(shape) == 2:
        return name
    if len(shape) == 1:
        return graph.emit("Unsqueeze", name, graph.ints(0), shape=(1, *shape))
    if isinstance(shape[-1], int):
        target = graph.ints(-1, shape[-1])
    else:
        target = join(graph, [graph.ints(-1), length(graph, name, len(shape) - 1)])
    return graph.emit("Reshape", name, target, shape=(_folded(shape[:-1]), shape[-1]))


def _folded(dims: Shape) -> Dim:
    """Length of several axes seen as one."""
    known = [n for n in dims if isinstance(n, int)]
    symbols = [n for n in dims if not isinstance(n, int)]
    count = int(np.prod(known)) if known else 1
    if not symbols:
        return count
    if len(symbols) == 1:
        return symbols[0] if count == 1 else f"{count}*{symbols[0]}"
    return "rows"


def reshaped(graph: Graph, value: str, shape: Shape, like: str = "") -> str:
    """See a value in another shape, that of ``like`` if the shape alone does not determine it."""
    target = reshape_target(graph.shape(value), shape)
    computed = target.count(-1) > 1
    name = lengths(graph, like) if computed else graph.ints(*target)
    return graph.emit("Reshape", value, name, shape=shape)


def reshape_target(source: Shape, shape: Shape) -> list[int]:
    """What ``Reshape`` is told to get one shape from another: 0 keeps a length, -1 is computed.

    More than one -1 means that the shape has to be computed from elsewhere.
    """
    return [
        n if isinstance(n, int) and n else 0 if i < len(source) and source[i] == n else -1
        for i, n in enumerate(shape)
    ]


def lengths(graph: Graph, name: str) -> str:
    """The shape of a value as an int64 vector, computed from inputs where it is symbolic."""
    shape = graph.shape(name)
    if all(isinstance(n, int) and n for n in shape):
        return graph.ints(*(int(n) for n in shape))
    return join(graph, [length(graph, name, axis) for axis in range(len(shape))])


def length(graph: Graph, name: str, axis: int) -> str:
    """One length of a value as an int64 vector of one element.

    Read from an input that has it, since inputs live as long as the graph runs; only a length that
    no input has is read from the value itself, right where that is made.
    """
    dim = graph.shape(name)[axis]
    if isinstance(dim, int) and dim:
        return graph.ints(dim)
    product = _PRODUCT.fullmatch(str(dim))
    factor, symbol = (int(product.group(1)), product.group(2)) if product else (1, dim)
    port = next((port for port in graph.inputs if symbol in port.shape), None)
    if port is None:
        return _own_length(graph, name, axis)
    place = port.shape.index(symbol)
    found = graph.emit("Shape", port.name, shape=(1,), start=place, end=place + 1)
    return found if factor == 1 else graph.emit("Mul", found, graph.ints(factor), shape=(1,))


def _own_length(graph: Graph, name: str, axis: int) -> str:
    first = len(graph.nodes)
    found = graph.emit("Shape", name, shape=(1,), start=axis, end=axis + 1)
    producer = graph.producers().get(name)
    if producer is not None:
        beside(graph, producer, first)
    return found


def join(graph: Graph, vectors: Sequence[str]) -> str:
    """Concatenate vectors of int64."""
    if len(vectors) == 1:
        return vectors[0]
    count = sum(int(graph.shape(name)[0]) for name in vectors)
    return graph.emit("Concat", *vectors, shape=(count,), axis=0)


def zeros(graph: Graph, like: str) -> str:
    """Zeros in the shape of a value."""
    return graph.emit("ConstantOfShape", lengths(graph, like), shape=graph.shape(like))


def expanded(graph: Graph, value: str, like: str) -> str:
    """Repeat a value along its axes of length 1 to the shape of another one."""
    if graph.shape(value) == graph.shape(like):
        return value
    return graph.emit("Expand", value, lengths(graph, like), shape=graph.shape(like))


def is_made_again(graph: Graph, name: str) -> bool:
    """Whether ``again`` makes a value again."""
    node = graph.producers().get(name)
    if node is None or name != node.outputs[0]:
        return False
    if node.op == "Mul":
        return any(is_made_again(graph, factor) for factor in node.inputs)
    if node.op == "Gelu":
        return node.attributes.get("approximate", "none") == "none"
    if node.op == "QuickGelu":
        return node.attributes.get("alpha") == 1.0
    return node.op in ("LayerNormalization", "SimplifiedLayerNormalization")


def again(graph: Graph, name: str) -> str:
    """A forward value for the backward pass: made again if its input is kept anyway.

    The output of a norm or an activation is one cheap node away from its input, which their own
    gradients read; so the input alone is kept. The new node is written in another, equal way, as
    ``merge_equal`` would otherwise let the backward pass read the old value.
    """
    if not is_made_again(graph, name):
        return name
    node = graph.producers()[name]
    shape, attributes = graph.shape(name), dict(node.attributes)
    if node.op == "Mul":
        factors = [again(graph, factor) for factor in node.inputs]
        return graph.emit("Mul", *factors, shape=shape)
    if node.op == "QuickGelu":
        gate = graph.emit("Sigmoid", node.inputs[0], shape=shape)
        return graph.emit("Mul", node.inputs[0], gate, shape=shape)
    if node.op != "Gelu":
        attributes["axis"] = len(shape) - 1 if attributes.get("axis", -1) == -1 else -1
    elif "approximate" in attributes:
        del attributes["approximate"]
    else:
        attributes["approximate"] = "none"
    made = graph.emit(node.op, *node.inputs, shape=shape, domain=node.domain)
    graph.nodes[-1].attributes = attributes
    return made


def beside(graph: Graph, node: Node, first: int) -> None:
    """Move the nodes emitted since position ``first`` to right behind a forward node.

    For what is smaller than the value it is made of, such as a mask: kept instead of the value.
    """
    moved = graph.nodes[first:]
    del graph.nodes[first:]
    for other in moved:
        other.scope = node.scope
    place = next(i for i, other in enumerate(graph.nodes) if other is node) + 1
    graph.nodes[place:place] = moved
