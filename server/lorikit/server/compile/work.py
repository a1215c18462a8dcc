# SPDX-License-Identifier: Apache-2.0
"""How many operations a forward graph takes, layer by layer, for any sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.graph import Graph, Node, Shape
from lorikit.server.compile.memory import VIEWS, elements
from lorikit.server.planner.speed import Operations

PRODUCTS = frozenset({"FusedMatMul", "Gemm", "MatMul"})
_FREE = VIEWS | {"Constant", "Gather", "Shape", "Size", "Slice"}
"""Operators that compute nothing, or next to nothing."""

Terms = list[tuple[Shape, int]]
"""Shapes with a factor each; together the sum of factor times elements."""


class LayerWork:
    """Operations of the parts of a forward graph."""

    def __init__(self, graph: Graph, frozen: Collection[str], architecture: Architecture) -> None:
        """Walk the graph once.

        Args:
            graph: Forward graph with shapes and scopes.
            frozen: Names of its frozen weights.
            architecture: Knows the layer of a scope.
        """
        self._weights: dict[int, int] = defaultdict(int)
        self._products: dict[int, Terms] = defaultdict(list)
        self._mixing: dict[int, Terms] = defaultdict(list)
        self._values: dict[int, Terms] = defaultdict(list)
        self._rows: Shape = ("batch", "length")
        self._known: dict[tuple[int, tuple[tuple[str, int], ...]], Operations] = {}
        for node in graph.nodes:
            layer = architecture.layer_of(node.scope)
            shape = graph.shapes.get(node.outputs[0], ())
            weight = next((name for name in node.inputs if name in frozen), None)
            if node.op == "Conv" and weight is not None:
                inner = graph.constants[weight].size // graph.constants[weight].shape[0]
                self._products[layer].append((shape, 2 * inner))
                self._rows = ("batch", *shape[2:])
            elif node.op not in PRODUCTS:
                if node.op not in _FREE:
                    self._values[layer].append((shape, 1))
            elif weight is not None and graph.constants[weight].ndim > 1:
                size = graph.constants[weight].size
                self._weights[layer] += size
                self._products[layer].append((shape[:-1], 2 * size))
            else:
                self._mix(graph, node, shape, layer)

    def _mix(self, graph: Graph, node: Node, shape: Shape, layer: int) -> None:
        """A product of values with values: as many operations as two per result and inner step."""
        given = graph.shapes.get(node.inputs[0])
        if given:
            inner = given[-2] if node.attributes.get("transA") else given[-1]
            self._mixing[layer].append(((*shape, inner), 2))

    def tokens(self, length: int) -> int:
        """Rows of an example: its tokens, or where convolutions read it the places of the last."""
        return elements(self._rows, {"batch": 1, "length": length})

    def operations(self, layers: Iterable[int], sizes: Mapping[str, int]) -> Operations:
        """Operations of some layers' forward pass; layer -1 is what lies outside of all."""
        total = Operations()
        key = tuple(sorted(sizes.items()))
        for layer in layers:
            if (layer, key) not in self._known:
                self._known[layer, key] = Operations(
                    weights=self._weights[layer],
                    products=_sum(self._products[layer], sizes),
                    mixing=_sum(self._mixing[layer], sizes),
                    values=_sum(self._values[layer], sizes),
                )
            total += self._known[layer, key]
        return total


def _sum(terms: Terms, sizes: Mapping[str, int]) -> int:
    return sum(factor * elements(shape, sizes) for shape, factor in terms)
