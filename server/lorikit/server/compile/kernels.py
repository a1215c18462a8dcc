# SPDX-License-Identifier: Apache-2.0
"""How a graph reads frozen weights: with which operator, and how much of a matrix at a time.

A graph never holds a de-quantised weight for longer than one use. Each use has its own
de-quantising nodes, placed right before it, so that forward and backward each pay the time and
neither keeps the memory. A large matrix is read in pieces of some rows, each a part of the matrix's
range in its blob: forward, y = x W^T, the pieces' results stand side by side; backward, dx = dy W,
they add up. So a large matrix is never whole in memory, in either direction. Only a table that the
graph also reads row by row is mapped once as a whole and cut at run time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorikit.server.compile.base import Base
from lorikit.server.compile.graph import Graph, Node
from lorikit.server.compile.readers import Piece, gather_rows, readers_for
from lorikit.server.compile.slices import row_ranges, sliced
from lorikit.server.errors import CompileError

PIECE_BYTES = 8 << 20
"""De-quantised bytes of a matrix up to which it is read at once, and of a piece of a larger one.

Smaller pieces are no faster, and each node costs about 5 KB: at 1.1 B parameters 8 MB is near the
least of pieces and nodes together.
"""

PIECE_ROWS = 32
"""Rows of a piece are a multiple of this, so that pieces begin on a page where rows allow it."""

KERNELS = ("lean", "fast")
"""``lean``: least memory. ``fast``: int4 forward products by a kernel that keeps a second copy."""


@dataclass(frozen=True, slots=True)
class KernelUse:
    """How one use of a frozen tensor reads it."""

    tensor: str
    codec: str
    kernel: str
    """Operator that reads the codes; ``mapped`` where values are read as they lie."""
    pieces: int
    """Parts that the tensor is read in."""


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What ``read_weights`` chose."""

    uses: tuple[KernelUse, ...]
    """One entry per use, in the order in which they run."""

    @property
    def tensors(self) -> set[str]:
        """Names of the stored tensors that the graph reads."""
        return {use.tensor for use in self.uses}

    @property
    def is_prepacked(self) -> bool:
        """Whether a kernel needs the runtime's pre-packing to be fast."""
        return any(use.kernel == "MatMulNBits" for use in self.uses)

    @property
    def uses_by_kernel(self) -> Mapping[str, int]:
        """Number of uses by codec and kernel, for example ``int8 DequantizeLinear``."""
        return Counter(f"{use.codec} {use.kernel}" for use in self.uses)

    @property
    def tensors_by_codec(self) -> Mapping[str, int]:
        """Number of tensors by codec."""
        return Counter(codec for _, codec in {(use.tensor, use.codec) for use in self.uses})


def read_weights(graph: Graph, base: Base, runtime: str, kernels: str = "lean") -> KernelReport:
    """Let every use of a frozen tensor read the base's blobs, in place.

    Rows that ``row_slice`` named are de-quantised at their first use and shared by the others.

    Args:
        graph: Graph whose frozen tensors are constants.
        base: Where they are stored, and how.
        runtime: ``onnx`` or ``onnx-training``.
        kernels: One of ``KERNELS``. A graph of which the report says ``is_prepacked`` has to be
            opened with pre-packing on, and only such a graph.

    Returns:
        Which kernel each use got.
    """
    if kernels not in KERNELS:
        raise CompileError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    reading = _Reading(graph, base, runtime, is_fast=kernels == "fast")
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        first = len(graph.nodes)
        reading.serve(node)
        for emitted in graph.nodes[first:]:
            emitted.scope = node.scope
        graph.nodes.append(node)
    return KernelReport(tuple(reading.uses))


class _Reading:
    """Gives the nodes of one graph their frozen inputs, one node after the other."""

    def __init__(self, graph: Graph, base: Base, runtime: str, *, is_fast: bool) -> None:
        self.uses: list[KernelUse] = []
        self._graph = graph
        self._stored = base.stored
        self._readers = readers_for(runtime, is_fast=is_fast)
        self._shared: dict[str, str] = {}
        self._tables = {node.inputs[0] for node in graph.nodes if node.op == "Gather"}

    def serve(self, node: Node) -> None:
        """Emit what reads the node's frozen inputs, and change the node where need be."""
        frozen = {i: piece for i, name in enumerate(node.inputs) if (piece := self._piece(name))}
        for position in sorted(frozen, reverse=True):
            piece, is_factor = frozen[position], position == 1 and 0 not in frozen
            if node.op == "Gather" and position == 0:
                self._note(piece, gather_rows(self._graph, node, piece))
            elif sliced(node.inputs[position]):
                _replace(node, position, self._shared_value(node.inputs[position], piece))
            elif is_factor and _is_forward(node):
                self._forward(node, piece)
            elif is_factor and _is_backward(node):
                self._backward(node, piece)
            else:
                _replace(node, position, self._value(piece))

    def _piece(self, name: str) -> Piece | None:
        if name in self._stored:
            return replace(Piece.whole(name, self._stored[name]), is_cut=name in self._tables)
        part = sliced(name)
        if part is None or part[0] not in self._stored:
            return None
        return Piece(part[0], self._stored[part[0]], *part[1:], is_cut=part[0] in self._tables)

    def _forward(self, node: Node, matrix: Piece) -> None:
        """Read y = x W^T (+ bias): the products of the pieces stand side by side."""
        reader = self._readers[matrix.codec]
        takes_pieces = reader.multiply is None or reader.takes_pieces
        pieces = _pieces(matrix) if takes_pieces else [matrix]
        if reader.multiply is None and len(pieces) == 1:
            _replace(node, 1, self._value(matrix))
            return
        products = [self._product(node, piece) for piece in pieces]
        self._note(matrix, products[0].op if reader.multiply else reader.kernel, len(pieces))
        self._join(node, products)

    def _product(self, node: Node, piece: Piece) -> Node:
        """Emit the product of x and a piece of W, without bias; return its node."""
        reader = self._readers[piece.codec]
        if reader.multiply is not None:
            product = reader.multiply(node.inputs[0], piece, self._graph)
        else:
            inputs = (node.inputs[0], reader.read(self._graph, piece))
            product = Node(node.op, inputs, (), node.attributes, node.domain)
        product.outputs = (self._graph.fresh("rows"),)
        lead = self._graph.shape(node.outputs[0])[:-1]
        self._graph.shapes[product.outputs[0]] = (*lead, piece.shape[0])
        self._graph.nodes.append(product)
        return product

    def _join(self, node: Node, products: Sequence[Node]) -> None:
        """Let the node itself give the final result: a join, the bias it had, or the product."""
        bias = node.inputs[2:]
        parts = [product.outputs[0] for product in products]
        joined = parts[0]
        if len(parts) > 1 and bias:
            shape = self._graph.shape(node.outputs[0])
            joined = self._graph.emit("Concat", *parts, shape=shape, axis=-1)
        if bias:
            _become(node, Node("Add", (joined, *bias), ()))
        elif len(parts) > 1:
            _become(node, Node("Concat", tuple(parts), (), {"axis": -1}))
        else:
            _become(node, self._graph.nodes.pop())

    def _backward(self, node: Node, matrix: Piece) -> None:
        """Read dx = dy W: the products of dy's columns with pieces of W's rows add up."""
        pieces = _pieces(matrix)
        if len(pieces) == 1:
            _replace(node, 1, self._value(matrix))
            return
        graph, reader = self._graph, self._readers[matrix.codec]
        dy, shape = node.inputs[0], graph.shape(node.outputs[0])
        rows, columns = matrix.shape
        flat, lead = dy, shape[:-1]
        if len(shape) > 2:
            lead = ("rows",)
            flat = graph.emit("Reshape", dy, graph.ints(-1, rows), shape=(*lead, rows))
        total: tuple[str, ...] = ()
        for piece in pieces:
            bounds = (graph.ints(piece.start), graph.ints(piece.stop), graph.ints(1))
            part = graph.emit("Slice", flat, *bounds, shape=(*lead, piece.shape[0]))
            value = reader.read(graph, piece)
            total = (graph.emit("Gemm", part, value, *total, shape=(*lead, columns)),)
        self._note(matrix, reader.kernel, len(pieces))
        if len(shape) == 2:
            _become(node, graph.nodes.pop())
            return
        outer = graph.emit("Shape", dy, shape=(len(shape) - 1,), start=0, end=-1)
        lengths = graph.emit("Concat", outer, graph.ints(columns), shape=(len(shape),), axis=0)
        _become(node, Node("Reshape", (*total, lengths), ()))

    def _value(self, piece: Piece) -> str:
        reader = self._readers[piece.codec]
        self._note(piece, reader.kernel)
        return reader.read(self._graph, piece)

    def _shared_value(self, name: str, piece: Piece) -> str:
        """The value of rows that have a name, made at their first use.

        onnxruntime gives each reader of a ``DequantizeLinear`` a copy of it, at the end of the
        graph and whatever the optimisation level (``EnsureUniqueDQForNodeUnit``); so there is only
        one, an ``Identity``, which costs nothing.
        """
        if name not in self._shared:
            value = self._value(piece)
            self._shared[name] = self._graph.emit("Identity", value, shape=piece.shape)
        return self._shared[name]

    def _note(self, piece: Piece, kernel: str, pieces: int = 1) -> None:
        self.uses.append(KernelUse(piece.name, piece.codec, kernel, pieces))


def _pieces(matrix: Piece) -> list[Piece]:
    """A matrix as pieces of about equal size, at most ``PIECE_BYTES`` each; fp32 stays whole."""
    size = 4 * matrix.size
    if size <= PIECE_BYTES or matrix.codec == "fp32":
        return [matrix]
    rows = matrix.shape[0]
    count = -(-size // PIECE_BYTES)
    most = -(-rows // (count * PIECE_ROWS)) * PIECE_ROWS
    return [matrix.rows(start, stop) for start, stop in row_ranges(rows, most)]


def _is_forward(node: Node) -> bool:
    """Whether a node is y = x W^T, with a bias perhaps."""
    given = _factors(node)
    return node.op in ("FusedMatMul", "Gemm") and given == {"transA": 0, "transB": 1}


def _is_backward(node: Node) -> bool:
    """Whether a node is dx = dy W."""
    if len(node.inputs) != 2:
        return False
    return node.op in ("MatMul", "FusedMatMul", "Gemm") and _factors(node) == {
        "transA": 0,
        "transB": 0,
    }


def _factors(node: Node) -> Mapping[str, object]:
    """Which factors are transposed, and whatever else changes the product."""
    plain = {"alpha": 1.0, "beta": 1.0, "transBatchA": 0, "transBatchB": 0}
    given = {"transA": 0, "transB": 0, **node.attributes}
    return {name: value for name, value in given.items() if plain.get(name) != value}


def _become(node: Node, other: Node) -> None:
    """Let a node compute what another does, under its own name."""
    node.op, node.domain = other.op, other.domain
    node.inputs, node.attributes = other.inputs, other.attributes


def _replace(node: Node, position: int, value: str) -> None:
    node.inputs = (*node.inputs[:position], value, *node.inputs[position + 1 :])
