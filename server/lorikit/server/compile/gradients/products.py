# SPDX-License-Identifier: Apache-2.0
"""Gradient rules of matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from lorikit.server.compile.gradients.parts import (
    Rule,
    again,
    integer,
    matmul,
    reduced_to,
    rows,
    unsupported,
)
from lorikit.server.compile.graph import Graph, Node, Shape


def plain_matmul(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """A B, batched and broadcast or not."""
    return _product_gradients(graph, node, dy, needs, 0, 0, 1.0)


def fused_matmul(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Product alpha op(A) op(B), op transposing the last two axes if asked."""
    ta, tb = integer(node, "transA", 0), integer(node, "transB", 0)
    if node.attributes.get("transBatchA", 0) or node.attributes.get("transBatchB", 0):
        raise unsupported(node, "with transposed batch axes")
    alpha = node.attributes.get("alpha", 1.0)
    assert isinstance(alpha, (int, float))
    return _product_gradients(graph, node, dy, needs, ta, tb, float(alpha))


def _product_gradients(
    graph: Graph,
    node: Node,
    dy: str,
    needs: Sequence[bool],
    ta: int,
    tb: int,
    alpha: float,
) -> Sequence[str | None]:
    a, b = node.inputs
    da = db = None
    if needs[0]:
        shape = _unbroadcast(graph, node, dy, a)
        pair = (b, dy) if ta else (dy, b)
        flags = (tb, 1) if ta else (0, 1 - tb)
        da = reduced_to(graph, matmul(graph, *pair, shape, *flags, alpha), a)
    a = again(graph, a) if needs[1] else a
    if needs[1] and _is_factor(graph, b) and len(graph.shape(a)) == 3 and not ta:
        db = _factor_gradient(graph, dy, a, b, tb, alpha)
    elif needs[1] and len(graph.shape(b)) == 2 and not ta:
        # One matrix for every row: the rows are summed by one product.
        pair = (rows(graph, dy), rows(graph, a))
        x, y = pair if tb else pair[::-1]
        db = graph.emit("Gemm", x, y, shape=graph.shape(b), transA=1, transB=0, alpha=alpha)
    elif needs[1]:
        shape = _unbroadcast(graph, node, dy, b)
        pair = (dy, a) if tb else (a, dy)
        flags = (1, ta) if tb else (1 - ta, 0)
        db = reduced_to(graph, matmul(graph, *pair, shape, *flags, alpha), b)
    return [da, db]


def _is_factor(graph: Graph, name: str) -> bool:
    """Whether a matrix is a factor of LoRA: one of its lengths is a rank, which is not fixed."""
    shape = graph.shape(name)
    return len(shape) == 2 and not all(isinstance(n, int) for n in shape)


def _factor_gradient(graph: Graph, dy: str, x: str, factor: str, tb: int, alpha: float) -> str:
    """Gradient of a small matrix, by example and then summed, which takes no reshaping."""
    shape: Shape = (graph.shape(dy)[0], *graph.shape(factor))
    pair = (dy, x) if tb else (x, dy)
    each = matmul(graph, *pair, shape, 1, 0, alpha)
    return reduced_to(graph, each, factor)


def _unbroadcast(graph: Graph, node: Node, dy: str, operand: str) -> Shape:
    """Shape of an operand's gradient before broadcasting is undone."""
    if any(len(graph.shape(name)) < 2 for name in node.inputs):
        raise unsupported(node, "with a vector")
    return (*graph.shape(dy)[:-2], *graph.shape(operand)[-2:])


def gemm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Sum alpha op(A) op(B) + beta C on matrices."""
    attributes = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **node.attributes}
    if (attributes["alpha"], attributes["beta"], attributes["transA"]) != (1.0, 1.0, 0):
        raise unsupported(node, f"with attributes {attributes}")
    a, b = node.inputs[:2]
    tb = integer(node, "transB", 0)
    gradients: list[str | None] = [None] * len(node.inputs)
    if needs[0]:
        gradients[0] = graph.emit("Gemm", dy, b, shape=graph.shape(a), transB=1 - tb)
    if needs[1]:
        pair = (dy, a) if tb else (a, dy)
        gradients[1] = graph.emit("Gemm", *pair, shape=graph.shape(b), transA=1)
    if len(needs) > 2 and needs[2]:
        gradients[2] = reduced_to(graph, dy, node.inputs[2])
    return gradients


RULES: dict[str, Rule] = {
    "FusedMatMul": fused_matmul,
    "Gemm": gemm,
    "MatMul": plain_matmul,
}
"""Rule by operator."""
