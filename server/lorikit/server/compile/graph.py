# SPDX-License-Identifier: Apache-2.0
"""The graph that compiler passes work on: ONNX nodes by name, without protobuf.

Order is meaning here: nodes stand in the order in which they run. Engines run a package's graph in
file order, so the place of a node decides how long its inputs stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Dim = int | str
Shape = tuple[Dim, ...]
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...]
Array = npt.NDArray[np.generic]

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's contrib operators."""


@dataclass(slots=True)
class Node:
    """One operator."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""
    scope: str = ""
    """Module path the node came from, for example ``bert.encoder.layer.0.attention.self.query``."""


@dataclass(frozen=True, slots=True)
class Port:
    """A named input or output of the graph."""

    name: str
    dtype: np.dtype[np.generic]
    shape: Shape


@dataclass(frozen=True, slots=True)
class External:
    """Where the bytes of a constant lie in a blob, so that a runtime can map them."""

    blob: str
    offset: int
    length: int


@dataclass(slots=True)
class Graph:
    """Nodes in execution order, constants, inputs and outputs; every value has a unique name."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    external: dict[str, External] = field(default_factory=dict)
    """Place of a constant that lives in a blob; the array itself stays in ``constants``."""
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    """Known shapes of values; symbols are names such as ``batch``."""
    dtypes: dict[str, np.dtype[np.generic]] = field(default_factory=dict)
    """Element types of values that are not float32, as far as they matter for memory."""
    _count: int = 0

    def copy(self) -> Graph:
        """A graph that can be changed without changing this one (arrays are shared)."""
        nodes = [
            Node(n.op, n.inputs, n.outputs, dict(n.attributes), n.domain, n.scope)
            for n in self.nodes
        ]
        return Graph(
            nodes,
            dict(self.constants),
            dict(self.external),
            list(self.inputs),
            list(self.outputs),
            dict(self.shapes),
            dict(self.dtypes),
            self._count,
        )

    def fresh(self, hint: str) -> str:
        """A value name that is not in use."""
        self._count += 1
        return f"{hint}#{self._count}"

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike, hint: str = "const") -> str:
        """Name of a constant with these values; equal small constants share one name."""
        array = np.asarray(values, dtype=dtype)
        if array.size <= 16:
            name = f"{hint}:{array.dtype.name}:{array.shape}:{array.tolist()}"
        else:
            name = self.fresh(hint)
        self.constants.setdefault(name, array)
        return name

    def ints(self, *values: int) -> str:
        """Name of an int64 vector constant."""
        return self.constant(values, np.int64, "ints")

    def floats(self, value: float) -> str:
        """Name of a float32 scalar constant."""
        return self.constant(value, np.float32, "float")

    def emit(
        self,
        op: str,
        *inputs: str,
        shape: Shape | None = None,
        hint: str = "",
        domain: str = "",
        scope: str = "",
        **attributes: Attribute,
    ) -> str:
        """Append a node with one output and return the output's name."""
        output = self.fresh(hint or op.lower())
        self.nodes.append(Node(op, inputs, (output,), attributes, domain, scope))
        if shape is not None:
            self.shapes[output] = shape
        return output

    def shape(self, name: str) -> Shape:
        """Shape of a value; raises ``KeyError`` with the name when unknown."""
        if name in self.constants:
            return self.constants[name].shape
        return self.shapes[name]

    def producers(self) -> dict[str, Node]:
        """Node by output name."""
        return {output: node for node in self.nodes for output in node.outputs}

    def input_names(self) -> set[str]:
        """Names of the graph's inputs."""
        return {port.name for port in self.inputs}

    def replace_uses(self, old: str, new: str) -> None:
        """Let every consumer of ``old``, and the graph's outputs, read ``new``."""
        for node in self.nodes:
            if old in node.inputs:
                node.inputs = tuple(new if name == old else name for name in node.inputs)
        self.outputs = [
            Port(new, port.dtype, port.shape) if port.name == old else port for port in self.outputs
        ]


def needed(graph: Graph, outputs: Iterable[str]) -> set[str]:
    """Every value the outputs depend on, themselves included."""
    producers = graph.producers()
    found: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if name in found or not name:
            continue
        found.add(name)
        if name in producers:
            stack.extend(producers[name].inputs)
    return found


def dependents(graph: Graph, sources: Iterable[str]) -> set[str]:
    """Every value that depends on one of the sources, themselves included."""
    reached = set(sources)
    for node in graph.nodes:
        if any(name in reached for name in node.inputs):
            reached.update(node.outputs)
    return reached


def topological(nodes: Sequence[Node]) -> list[Node]:
    """The nodes in an order in which every input is produced before its use, else as they stand."""
    producers = {output: node for node in nodes for output in node.outputs}
    done: set[int] = set()
    ordered: list[Node] = []
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, ready = stack.pop()
            if id(node) in done:
                continue
            if ready:
                done.add(id(node))
                ordered.append(node)
                continue
            stack.append((node, True))
            before = [producers[name] for name in reversed(node.inputs) if name in producers]
            stack.extend((other, False) for other in before if id(other) not in done)
    return ordered
