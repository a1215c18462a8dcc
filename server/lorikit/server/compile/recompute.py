# SPDX-License-Identifier: Apache-2.0
"""Per-layer recomputation: a layer's forward values are made again for its backward part.

Without it every forward value that the backward part reads lives from the forward pass to there.
With it only the value that enters the layer does. The backward part of a recomputed layer reads
clones of the forward nodes, each placed right before the first node that reads it; engines run
nodes in the order in which they stand, so nothing else is needed to have them run late.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
https://arxiv.org/abs/1604.06174, on a finished graph and layer by layer.

Values that grow with the square of the length, which are the scores of attention and what is made
of them, are a special case: they are much to keep and little to make, from queries and keys that
the backward part reads anyway. They are made again in every layer.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
https://arxiv.org/abs/2205.05198, section 5, selective recomputation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.graph import Graph, Node, Shape, needed

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
"""Operators that a second run would answer differently; their results are kept."""

_SYMBOL = re.compile(r"[A-Za-z]\w*")

_FEW_ELEMENTS = 16
"""Up to so many elements a value is a length or an index, and cheaper to keep than to make."""


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What the pass did for one layer."""

    layer: int
    nodes: int
    """Forward nodes that run twice."""
    released: tuple[str, ...]
    """Forward values that are no longer kept for the backward part."""


def recompute_layers(
    graph: Graph,
    architecture: Architecture,
    layers: Sequence[int],
    *,
    forward_outputs: Sequence[str] = ("loss",),
) -> tuple[Recomputation, ...]:
    """Make the forward values that the backward part of some layers reads again, in place.

    The gradients keep their bits: a clone has the operator, attributes and inputs of its original.
    What enters a layer (its hidden states, masks, tables, weights), what leaves it, and random
    numbers are not made again. Run it while frozen weights are still constants, so that each
    clone gets de-quantising nodes of its own, and run no pass that merges equal nodes after it.

    Args:
        graph: Training graph: forward, loss and backward in execution order.
        architecture: Knows the layer of a scope.
        layers: Layers to recompute; one without a backward part is left as it is.
        forward_outputs: Outputs that depend on the forward pass alone; what they need is forward.

    Returns:
        One entry per layer, in the order given.
    """
    forward = needed(graph, forward_outputs)
    _take_lengths_early(graph, forward)
    return tuple(_recompute_layer(graph, architecture, layer, forward) for layer in layers)


def recompute_scores(
    graph: Graph, architecture: Architecture, *, forward_outputs: Sequence[str] = ("loss",)
) -> tuple[Recomputation, ...]:
    """Make the layers' values that grow with the square of a length again, in place.

    To run after ``recompute_layers``; layers that are recomputed whole are left as they are.
    Arguments and results are those of ``recompute_layers``; a layer without such values in its
    backward part has no entry.
    """
    forward = needed(graph, forward_outputs)
    by_layer: dict[int, dict[str, Node]] = {}
    for node in graph.nodes:
        layer = architecture.layer_of(node.scope)
        if layer >= 0 and _is_forward(node, forward) and node.op not in _RANDOM:
            quadratic = [n for n in node.outputs if _is_quadratic(graph.shapes.get(n, ()))]
            by_layer.setdefault(layer, {}).update(dict.fromkeys(quadratic, node))
    outputs = {port.name for port in graph.outputs}
    done = [
        _recompute(graph, layer, originals, outputs, forward)
        for layer, originals in sorted(by_layer.items())
    ]
    return tuple(entry for entry in done if entry.nodes)


def _is_quadratic(shape: Shape) -> bool:
    """Whether two axes of a value grow with the same symbol."""
    symbols = Counter(
        symbol
        for dim in shape
        if isinstance(dim, str)
        for symbol in set(_SYMBOL.findall(dim)) - {"rows"}
    )
    return any(count > 1 for count in symbols.values())


def _take_lengths_early(graph: Graph, forward: set[str]) -> None:
    """Read lengths of forward values where these are made, so that no value lives for its shape."""
    producers = {output for node in graph.nodes for output in node.outputs}
    early: dict[str, list[Node]] = {}
    rest: list[Node] = []
    for node in graph.nodes:
        is_length = node.op == "Shape" and node.inputs[0] in forward & producers
        if is_length and not _is_forward(node, forward):
            early.setdefault(node.inputs[0], []).append(node)
        else:
            rest.append(node)
    graph.nodes = []
    for node in rest:
        graph.nodes.append(node)
        for output in node.outputs:
            taken = early.get(output, [])
            graph.nodes.extend(taken)
            forward.update(length.outputs[0] for length in taken)


def _recompute_layer(
    graph: Graph, architecture: Architecture, layer: int, forward: set[str]
) -> Recomputation:
    originals = {
        output: node
        for node in graph.nodes
        if _is_forward(node, forward) and architecture.layer_of(node.scope) == layer
        for output in node.outputs
        if output
    }
    return _recompute(graph, layer, originals, _kept(graph, originals, forward), forward)


def _recompute(
    graph: Graph, layer: int, originals: Mapping[str, Node], kept: set[str], forward: set[str]
) -> Recomputation:
    """Let the backward part read clones of the nodes that make ``originals``, but for ``kept``."""
    twin: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if not _is_forward(node, forward):
            wanted = [name for name in node.inputs if name in originals and name not in kept]
            nodes.extend(_clones(graph, originals, kept, wanted, twin))
            node.inputs = _with_twins(node, kept, twin)
        nodes.append(node)
    cloned = len(nodes) - len(graph.nodes)
    graph.nodes = nodes
    released = tuple(name for name in twin if name not in kept)
    return Recomputation(layer, cloned, released)


def _kept(graph: Graph, originals: Mapping[str, Node], forward: set[str]) -> set[str]:
    """Values of a layer that stay: what leaves it, with its statistics; random numbers; lengths."""
    inside = {id(node) for node in originals.values()}
    leaving = {port.name for port in graph.outputs}
    for node in graph.nodes:
        if _is_forward(node, forward) and id(node) not in inside and node.op != "Shape":
            leaving.update(node.inputs)
    return {
        name
        for name, node in originals.items()
        if name in leaving
        or node.op in _RANDOM
        or _is_small(graph, name)
        or (_is_statistic(graph, name) and leaving.intersection(node.outputs))
    }


def _is_forward(node: Node, forward: set[str]) -> bool:
    return any(output in forward for output in node.outputs)


def _is_statistic(graph: Graph, name: str) -> bool:
    """Whether a value has one number a row, such as a normalisation's mean."""
    return graph.shapes.get(name, ())[-1:] == (1,)


def _is_small(graph: Graph, name: str) -> bool:
    """Whether a value holds a few numbers whatever the batch; index arithmetic has no shape."""
    shape = graph.shapes.get(name)
    if shape is None:
        return True
    count = 1
    for dim in shape:
        if not isinstance(dim, int):
            return False
        count *= dim
    return count <= _FEW_ELEMENTS


def _clones(
    graph: Graph,
    originals: Mapping[str, Node],
    kept: set[str],
    wanted: Sequence[str],
    twin: dict[str, str],
) -> Iterator[Node]:
    """Clones that have to run before the wanted values' twins can be read, in running order."""
    stack = [(name, False) for name in reversed(wanted)]
    while stack:
        name, ready = stack.pop()
        if name in twin:
            continue
        node = originals[name]
        if not ready:
            stack.append((name, True))
            before = [n for n in reversed(node.inputs) if n in originals and n not in kept]
            stack.extend((n, False) for n in before if n not in twin)
            continue
        inputs = _with_twins(node, kept, twin)
        twin.update((output, _named_like(graph, output)) for output in node.outputs if output)
        outputs = tuple(twin.get(output, "") for output in node.outputs)
        yield Node(node.op, inputs, outputs, dict(node.attributes), node.domain, node.scope)


def _with_twins(node: Node, kept: set[str], twin: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name if name in kept else twin.get(name, name) for name in node.inputs)


def _named_like(graph: Graph, value: str) -> str:
    """A fresh name with the shape and type of a value."""
    name = graph.fresh(f"{value}/again")
    if value in graph.shapes:
        graph.shapes[name] = graph.shapes[value]
    if value in graph.dtypes:
        graph.dtypes[name] = graph.dtypes[value]
    return name
