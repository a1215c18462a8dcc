# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a graph from the life of its values.

Engines run a graph in file order and release a value after its last use, so the peak follows from
the graph alone. Values that only look at another one's bytes (``Reshape`` and its like) cost
nothing, and elementwise operators write over an input that is not read again, as onnxruntime does.
Which values share bytes does not depend on sizes, so a graph is walked once, and each plan for it
(batch, length, rank) costs a few sums.

Source of the rules: onnxruntime's ``core/framework/allocation_planner.cc`` (``FindReusableInput``)
and the ``MayInplace`` and ``Alias`` declarations of its CPU kernels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import helper

from lorikit.server.compile.arena import Event, touched_bytes
from lorikit.server.compile.graph import Graph, Node, Shape
from lorikit.server.methods.base_delta import DELTA_RANK

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"})
"""Operators whose result shares the bytes of their first input."""

IN_PLACE = frozenset(
    {"Cast", "Clip", "Elu", "LeakyRelu", "LogSoftmax", "Relu", "Sigmoid", "Softmax", "Tanh"}
)
"""Operators that write their result over an input of the same shape that is not read again.

Found by counting what small graphs hold; sums, products, ``Exp``, ``Neg``, ``Erf``, ``Gelu`` and
the like never do.
"""

_HANDED_ON = frozenset(
    {
        "Concat",
        "Expand",
        "Gather",
        "GatherElements",
        "GatherND",
        "Slice",
        "Split",
        "Tile",
        "Transpose",
        *VIEWS,
    }
)
"""Operators whose result has the element type of their first input."""

_TRUTHS = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not"})

_LENGTHS = frozenset({"Shape", "Size"})

RUNS = 6
"""Runs of a graph after which its arena hardly grows: results of one run lie between the values of
the next, which splits chunks. With 2 x 128 tokens MiniLM's arena holds 38 MB after two runs and
42 MB after six."""

_FLOAT = np.dtype(np.float32)

_MINIMUM = re.compile(r"Min\((\d+), (\w+)\)")


@dataclass(frozen=True, slots=True)
class Peak:
    """Where a graph needs most."""

    live_bytes: int
    """Largest sum of live values, without inputs and constants."""
    node: str
    """Output of the node at which that happens."""
    workspace_bytes: int = 0
    """The part of it that are de-quantised weights."""


@dataclass(slots=True)
class _Buffer:
    """Bytes that one or more values live in, one after the other."""

    shape: int
    first: int
    last: int
    is_weight: bool


class Lifetimes:
    """Which bytes of a graph live from which node to which, for any sizes."""

    def __init__(self, graph: Graph) -> None:
        """Walk the graph once.

        Args:
            graph: Nodes in execution order, with shapes.
        """
        self._shapes: dict[tuple[Shape, int], int] = {}
        nodes = in_running_order(graph.nodes)
        self._names = [node.outputs[0] for node in nodes]
        buffers = _Walk(graph, nodes, self._shapes).buffers
        self._shape_of = np.array([b.shape for b in buffers], np.int64)
        self._first = np.array([b.first for b in buffers], np.int64)
        self._last = np.array([b.last for b in buffers], np.int64)
        self._is_weight = np.array([b.is_weight for b in buffers], np.bool_)

    def peak(self, sizes: Mapping[str, int]) -> Peak:
        """Peak of the live values for concrete sizes.

        Args:
            sizes: Length by symbol, for example ``{"batch": 1, "length": 32, "rank_0": 8}``.
        """
        if not len(self._shape_of):
            return Peak(0, "")
        nbytes = self._bytes(sizes)
        live = self._live(nbytes)
        place = int(np.argmax(live))
        return Peak(
            int(live[place]),
            self._names[place],
            int(self._live(np.where(self._is_weight, nbytes, 0))[place]),
        )

    def arena_bytes(self, sizes: Mapping[str, int], runs: int = RUNS) -> int:
        """Bytes that onnxruntime's arena makes resident over some runs of the graph; see ``arena``.

        Args:
            sizes: As for ``peak``.
            runs: How often the graph runs.
        """
        return touched_bytes(*[[*self.events(sizes)]] * runs)

    def events(self, sizes: Mapping[str, int]) -> Iterator[Event]:
        """Requests to the allocator in the order of the nodes."""
        nbytes = self._bytes(sizes).tolist()
        ends: dict[int, list[int]] = {}
        for buffer, last in enumerate(self._last.tolist()):
            ends.setdefault(last, []).append(buffer)
        starts = self._first.tolist()
        buffer = 0
        for position in range(len(self._names)):
            while buffer < len(starts) and starts[buffer] == position:
                yield buffer, nbytes[buffer]
                buffer += 1
            for ended in ends.get(position, ()):
                yield ended, -1

    def _bytes(self, sizes: Mapping[str, int]) -> npt.NDArray[np.int64]:
        by_shape = [elements(shape, sizes) * width for shape, width in self._shapes]
        return np.array(by_shape, np.int64)[self._shape_of]

    def _live(self, nbytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Live bytes while each node runs."""
        count = len(self._names)
        change = np.zeros(count + 2, np.int64)
        np.add.at(change, self._first, nbytes)
        np.add.at(change, self._last + 1, -nbytes)
        return np.cumsum(change)[:count]


class GraphMemory:
    """What a training graph needs beside its inputs, for any sizes, without the graph itself."""

    def __init__(self, graph: Graph) -> None:
        """Note what predictions need.

        Args:
            graph: Training graph that reads its base.
        """
        self.lifetimes = Lifetimes(graph)
        self.node_count = len(graph.nodes)
        packed = {n.inputs[1] for n in graph.nodes if n.op == "MatMulNBits"}
        self.packed_bytes = sum(graph.constants[name].nbytes for name in packed)
        """Bytes of codes that a kernel keeps a packed copy of."""
        places = {place for name, place in graph.external.items() if name not in packed}
        self.mapped_bytes = sum(place.length for place in places)
        """Bytes of blobs that a step reads. Codes that are packed count only where another node
        reads them as they lie: the runtime lets go of what it has packed. Tables count in full,
        although a step reads a few rows: words are spread over the table, and the system maps
        sixteen pages around each one."""

    def arena_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes that the runtime's arena makes resident over steps of some sizes."""
        return self.lifetimes.arena_bytes(sizes)


class _Walk:
    """One pass over the nodes that finds the buffers and how long each lives.

    A value is counted as used once for each input it is and once as an output of the graph. Values
    in one buffer add up. A result goes over an input only if that is the buffer's last use.
    """

    def __init__(
        self, graph: Graph, nodes: Sequence[Node], shapes: dict[tuple[Shape, int], int]
    ) -> None:
        self.buffers: list[_Buffer] = []
        self._graph = graph
        self._end = len(nodes)
        self._shapes = shapes
        self._outputs = {port.name for port in graph.outputs}
        self._uses = Counter(name for node in graph.nodes for name in node.inputs)
        self._uses.update(self._outputs)
        self._left: list[int] = []
        self._buffer_of: dict[str, int] = {}
        self._fixed = set(graph.constants)
        self._widths = {name: array.dtype.itemsize for name, array in graph.constants.items()}
        self._widths |= {port.name: port.dtype.itemsize for port in graph.inputs}
        for position, node in enumerate(nodes):
            self._run(node, position)

    def _run(self, node: Node, position: int) -> None:
        fixed = all(name in self._fixed for name in node.inputs if name) and bool(node.inputs)
        for place, output in enumerate(node.outputs):
            if not output:
                continue
            self._widths[output] = self._width(node, output)
            shared = None if place else self._shared(node, output)
            if shared is None:
                self._make(output, position, is_weight=fixed)
            elif shared >= 0:
                self._left[shared] += self._uses[output]
                self._buffer_of[output] = shared
            if fixed:
                self._fixed.add(output)
        self._work(node, position)
        self._release(node, position)

    def _work(self, node: Node, position: int) -> None:
        """What a kernel asks for while it runs, beside its result."""
        if node.op == "MatMulBnb4":
            whole = (_whole(node, "N"), _whole(node, "K"))
            self._add((whole, _FLOAT.itemsize), position, last=position, is_weight=True)
        elif node.op == "Where":
            shape = self._graph.shapes.get(node.outputs[0], (0,))
            for _ in range(2):
                key = (shape, self._widths[node.outputs[0]])
                self._add(key, position, last=position, is_weight=False)

    def _shared(self, node: Node, output: str) -> int | None:
        """Buffer that a result is written to without asking for one; -1 for none of ours."""
        if output in self._outputs:
            return None
        if node.op in VIEWS:
            return self._buffer_of.get(node.inputs[0], -1)
        buffer = self._buffer_of.get(node.inputs[0]) if node.op in IN_PLACE else None
        if buffer is None or self._left[buffer] > 1 or not self._same(node.inputs[0], output):
            return None
        return buffer

    def _same(self, one: str, other: str) -> bool:
        shape = self._graph.shapes.get(one)
        return (
            shape is not None
            and shape == self._graph.shapes.get(other)
            and self._widths[one] == self._widths[other]
        )

    def _width(self, node: Node, output: str) -> int:
        """Bytes of an element: what the graph says, else what the operator implies."""
        if output in self._graph.dtypes:
            return self._graph.dtypes[output].itemsize
        if node.op == "Cast":
            to = node.attributes.get("to")
            return helper.tensor_dtype_to_np_dtype(to).itemsize if isinstance(to, int) else 4
        if node.op in _TRUTHS:
            return 1
        if node.op in _LENGTHS:
            return 8
        if node.op in _HANDED_ON:
            return self._widths.get(node.inputs[0], 4)
        return _FLOAT.itemsize

    def _make(self, output: str, position: int, *, is_weight: bool) -> None:
        """A buffer of its own; one of unknown shape is index arithmetic and counts as nothing."""
        shape = self._graph.shapes.get(output, (0,))
        self._buffer_of[output] = len(self.buffers)
        key = (shape, self._widths[output])
        self._add(key, position, last=self._end, is_weight=is_weight, uses=self._uses[output])

    def _add(
        self, key: tuple[Shape, int], position: int, *, last: int, is_weight: bool, uses: int = 0
    ) -> None:
        number = self._shapes.setdefault(key, len(self._shapes))
        self._left.append(uses)
        self.buffers.append(_Buffer(number, position, last, is_weight=is_weight))

    def _release(self, node: Node, position: int) -> None:
        touched = [self._buffer_of[name] for name in node.inputs if name in self._buffer_of]
        for buffer in touched:
            self._left[buffer] -= 1
        own = [self._buffer_of[name] for name in node.outputs if name in self._buffer_of]
        for buffer in (*touched, *own):
            if self._left[buffer] == 0:
                self.buffers[buffer].last = min(self.buffers[buffer].last, position)


def _whole(node: Node, name: str) -> int:
    value = node.attributes[name]
    assert isinstance(value, int)
    return value


def in_running_order(nodes: Sequence[Node]) -> list[Node]:
    """The nodes as onnxruntime runs them: in file order, but lengths as soon as they can be read.

    Source: ``PriorityNodeCompare`` in onnxruntime's ``core/graph/graph_viewer.cc``.
    """
    made = {output for node in nodes for output in node.outputs}
    lengths: dict[str, list[Node]] = {}
    for node in nodes:
        if node.op in _LENGTHS and node.inputs[0] in made:
            lengths.setdefault(node.inputs[0], []).append(node)
    ordered: list[Node] = []
    for node in nodes:
        if node.op in _LENGTHS and node.inputs[0] in made:
            continue
        ordered.append(node)
        for output in node.outputs:
            ordered.extend(lengths.get(output, ()))
    return ordered


def peak_memory(graph: Graph, sizes: Mapping[str, int]) -> Peak:
    """Peak of the live values of a graph for concrete sizes; see ``Lifetimes.peak``."""
    return Lifetimes(graph).peak(sizes)


def value_bytes(graph: Graph, name: str, sizes: Mapping[str, int]) -> int:
    """Bytes of one value; one of unknown shape is index arithmetic and counts as nothing."""
    shape = graph.shapes.get(name)
    if shape is None:
        return 0
    return elements(shape, sizes) * graph.dtypes.get(name, _FLOAT).itemsize


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
    if symbol.startswith(DELTA_RANK):
        return sizes[DELTA_RANK]
    if "+" in symbol or "*" in symbol:
        terms = (term.split("*") for term in symbol.split("+"))
        return sum(math.prod(_factor(part.strip(), sizes) for part in term) for term in terms)
    return 1


def _factor(text: str, sizes: Mapping[str, int]) -> int:
    return int(text) if text.isdigit() else _length(text, sizes)
