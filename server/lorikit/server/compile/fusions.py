# SPDX-License-Identifier: Apache-2.0
"""Passes over a forward graph that put one operator where the exporter wrote several.

A node costs a session about 6 kB and opening time, and every value between two nodes is a buffer
that the backward pass may keep. Each pass changes the graph in place, returns how many places it
found, and leaves a place alone that is not exactly what it knows. All operators are in stock
onnxruntime from 1.19 to 1.31 for CPUs, with the same results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorikit.server.compile.cleaning import merge_equal, remove_dead
from lorikit.server.compile.gradients.parts import reshape_target, reshaped
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Shape


def fuse_forward(graph: Graph) -> dict[str, int]:
    """Run every fusion on a forward graph; how often each was found.

    To run after ``fuse_linear`` and before ``add_gradients``.
    """
    passes = (
        fix_reshapes,
        fuse_rms_norm,
        fuse_silu,
        fuse_rotary,
        fuse_products,
        fold_query_heads,
        scale_at_rank,
    )
    found = {fusion.__name__: fusion(graph) for fusion in passes}
    merge_equal(graph)
    remove_dead(graph)
    return found


def fix_reshapes(graph: Graph) -> int:
    """Let a Reshape say what it does without computing lengths; return how many now do.

    A runtime that knows a shape before the run plans its memory faster, and the few nodes that
    computed it go.
    """
    count = 0
    for node in graph.nodes:
        if node.op != "Reshape" or node.inputs[1] in graph.constants:
            continue
        source, shape = graph.shapes.get(node.inputs[0]), graph.shapes.get(node.outputs[0])
        if source is None or shape is None:
            continue
        target = reshape_target(source, shape)
        if target.count(-1) > 1:
            continue
        node.inputs, node.attributes = (node.inputs[0], graph.ints(*target)), {}
        count += 1
    remove_dead(graph)
    return count


def fuse_rms_norm(graph: Graph) -> int:
    """Let w x / sqrt(mean(x^2) + epsilon) be one node; return how many were found.

    ``SimplifiedLayerNormalization`` is the contrib operator that onnxruntime registers in the
    standard domain. Its second output, the inverse deviation, is what its gradient needs.
    """
    producers = graph.producers()
    count = 0
    for node in graph.nodes:
        for weight, normed in _pairs(node, "Mul"):
            found = _rms_input(graph, producers, normed)
            if found is None or len(graph.shape(weight)) != 1:
                continue
            x, epsilon = found
            node.op, node.inputs = "SimplifiedLayerNormalization", (x, weight)
            node.attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
            count += 1
            break
    remove_dead(graph)
    return count


def _rms_input(
    graph: Graph, producers: Mapping[str, Node], normed: str
) -> tuple[str, float] | None:
    """Find x and epsilon where a value is x * reciprocal(sqrt(mean(x^2) + epsilon))."""
    for x, factor in _pairs(producers.get(normed), "Mul"):
        root = _argument(producers, factor, "Reciprocal")
        summed = producers.get(_argument(producers, root, "Sqrt"))
        for mean, epsilon in _pairs(summed, "Add"):
            reduced = producers.get(mean)
            if reduced is None or reduced.op != "ReduceMean" or epsilon not in graph.constants:
                continue
            square = producers.get(reduced.inputs[0])
            if _is_square(graph, square, x) and _reduces_last(graph, reduced):
                return x, float(graph.constants[epsilon].item())
    return None


def _is_square(graph: Graph, node: Node | None, x: str) -> bool:
    if node is None or node.inputs[0] != x:
        return False
    return (node.op == "Mul" and node.inputs[1] == x) or (
        node.op == "Pow" and _scalar(graph, node.inputs[1]) == 2
    )


def _reduces_last(graph: Graph, node: Node) -> bool:
    axes = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    last = len(graph.shape(node.inputs[0])) - 1
    return axes is not None and axes.tolist() in ([-1], [last])


def fuse_silu(graph: Graph) -> int:
    """Let x sigmoid(x) be one node; return how many were found.

    ``QuickGelu`` with alpha 1 is that function. Its gradient computes the sigmoid again from x,
    so that no layer keeps it.
    """
    producers = graph.producers()
    count = 0
    for node in graph.nodes:
        for x, gate in _pairs(node, "Mul"):
            if _argument(producers, gate, "Sigmoid") != x:
                continue
            node.op, node.domain, node.inputs = "QuickGelu", MICROSOFT, (x,)
            node.attributes = {"alpha": 1.0}
            count += 1
            break
    remove_dead(graph)
    return count


def fuse_rotary(graph: Graph) -> int:
    """Let x cos + rotate_half(x) sin be one node; return how many were found.

    ``RotaryEmbedding`` reads one half of the tables, as both are equal, and position 0 is the first
    row; negating the sine turns it back, which is its gradient.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split layout of GPT-NeoX.
    """
    producers = graph.producers()
    tables: dict[str, str] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "Add":
            continue
        found = _rotated(graph, producers, node)
        if found is None:
            continue
        x, cosine, sine = found
        halves = [_half_table(graph, producers, name, tables) for name in (cosine, sine)]
        if halves[0] is None or halves[1] is None:
            continue
        node.op, node.domain = "RotaryEmbedding", MICROSOFT
        node.inputs = (x, graph.ints(0), halves[0], halves[1])
        node.attributes = {"interleaved": 0}
        count += 1
    remove_dead(graph)
    return count


def _rotated(
    graph: Graph, producers: Mapping[str, Node], node: Node
) -> tuple[str, str, str] | None:
    """x, cosine and sine where a node adds x * cosine and rotate_half(x) * sine."""
    for straight, crossed in _pairs(node):
        for x, cosine in _pairs(producers.get(straight), "Mul"):
            if len(graph.shape(x)) != 4:
                continue
            for turned, sine in _pairs(producers.get(crossed), "Mul"):
                if _is_rotate_half(graph, producers, turned, x):
                    return x, cosine, sine
    return None


def _is_rotate_half(graph: Graph, producers: Mapping[str, Node], turned: str, x: str) -> bool:
    joined = producers.get(turned)
    width = graph.shape(x)[-1]
    if joined is None or joined.op != "Concat" or len(joined.inputs) != 2:
        return False
    if not isinstance(width, int) or joined.attributes.get("axis") not in (-1, 3):
        return False
    upper = producers.get(_argument(producers, joined.inputs[0], "Neg"))
    lower = producers.get(joined.inputs[1])
    return _is_slice(graph, upper, x, width // 2, width) and _is_slice(
        graph, lower, x, 0, width // 2
    )


def _is_slice(graph: Graph, node: Node | None, x: str, start: int, end: int) -> bool:
    """Whether a node takes a range of x along the last axis."""
    if node is None or node.op != "Slice" or node.inputs[0] != x or len(node.inputs) < 4:
        return False
    numbers = [_scalar(graph, name) for name in node.inputs[1:]]
    if any(number is None for number in numbers) or numbers[2] not in (-1, 3):
        return False
    width = graph.shape(x)[-1]
    assert isinstance(width, int)
    stop = min(int(numbers[1] or 0), width)
    return numbers[0] == start and stop == end and numbers[3:] in ([], [1])


def _half_table(
    graph: Graph, producers: Mapping[str, Node], name: str, tables: dict[str, str]
) -> str | None:
    """One half of a table of cosines or sines as a matrix [length, width / 2].

    None where the table differs between examples, or is not made of two equal halves.
    """
    node = producers.get(name)
    while node is not None and node.op == "Unsqueeze":
        name = node.inputs[0]
        node = producers.get(name)
    source = node
    while source is not None and source.op in ("Cos", "Sin", "Mul", "Cast"):
        if source.op == "Mul" and _scalar(graph, source.inputs[1]) is None:
            return None
        source = producers.get(source.inputs[0])
    if node is None or source is None or source.op != "Concat" or len(set(source.inputs)) != 1:
        return None
    shape = graph.shape(name)
    width = shape[-1]
    if any(n != 1 for n in shape[:-2]) or not isinstance(width, int) or len(source.inputs) != 2:
        return None
    if name not in tables:
        first = len(graph.nodes)
        ends = (graph.ints(0), graph.ints(width // 2), graph.ints(-1))
        half = graph.emit("Slice", name, *ends, shape=(*shape[:-1], width // 2))
        matrix: Shape = (shape[-2], width // 2)
        tables[name] = graph.emit("Reshape", half, graph.ints(-1, width // 2), shape=matrix)
        _move(graph, first, graph.nodes.index(node) + 1, node.scope)
    return tables[name]


def fuse_products(graph: Graph) -> int:
    """Let a product do the scaling and transposing around it; return how many were found.

    ``MatMul(a, Transpose(b)) * scale``, the scores of attention, becomes one ``FusedMatMul``.
    """
    producers = graph.producers()
    uses = _uses(graph)
    count = 0
    done: set[str] = set()
    for node in reversed(graph.nodes):
        product, alpha = node, 1.0
        for value, factor in _pairs(node, "Mul"):
            scale = _scalar(graph, factor)
            inner = producers.get(value)
            if scale is not None and inner is not None and uses[value] == 1:
                product, alpha = inner, scale
        if product.op != "MatMul" or product.outputs[0] in done:
            continue
        (a, ta), (b, tb) = (_untransposed(graph, producers, name) for name in product.inputs)
        if not ta and not tb and alpha == 1.0:
            continue
        done.add(product.outputs[0])
        node.op, node.domain, node.inputs = "FusedMatMul", MICROSOFT, (a, b)
        node.attributes = {"transA": int(ta), "transB": int(tb), "alpha": alpha}
        count += 1
    remove_dead(graph)
    return count


def _untransposed(graph: Graph, producers: Mapping[str, Node], name: str) -> tuple[str, bool]:
    """What a value is the transpose of in its last two axes, and whether it is one."""
    node = producers.get(name)
    rank = len(graph.shape(name))
    if node is None or node.op != "Transpose" or rank < 2:
        return name, False
    swapped = (*range(rank - 2), rank - 1, rank - 2)
    return (node.inputs[0], True) if node.attributes.get("perm") == swapped else (name, False)


def fold_query_heads(graph: Graph) -> int:
    """Multiply grouped queries with the keys and values they share; return how many were found.

    Where [batch, groups, length, width] is repeated to [batch, heads, ...] for a product, the
    queries are seen as [batch, groups, heads / groups * length, width] instead, which copies
    nothing, and the gradient of keys and values is summed over the heads by the product itself.

    Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245, grouped-query attention.
    """
    producers = graph.producers()
    count = 0
    for node in list(graph.nodes):
        if node.op not in ("MatMul", "FusedMatMul") or node.attributes.get("transA", 0):
            continue
        shared = _repeated(graph, producers, node.inputs[1])
        if shared is not None and len(graph.shape(node.inputs[0])) == 4:
            _fold(graph, node, shared)
            count += 1
    remove_dead(graph)
    return count


def _repeated(graph: Graph, producers: Mapping[str, Node], name: str) -> str | None:
    """What a value repeats along its heads: Reshape(Expand(Unsqueeze(shared, 2)))."""
    wide = producers.get(_argument(producers, name, "Reshape"))
    if wide is None or wide.op != "Expand":
        return None
    shared = _argument(producers, wide.inputs[0], "Unsqueeze")
    if not shared:
        return None
    source, target = graph.shape(shared), graph.shape(name)
    groups, heads = source[1], target[1]
    if len(source) != 4 or len(target) != 4 or source[2:] != target[2:]:
        return None
    if graph.shape(wide.inputs[0]) != (*source[:2], 1, *source[2:]):
        return None
    known = isinstance(groups, int) and isinstance(heads, int)
    return shared if known and int(heads) % int(groups) == 0 else None


def _fold(graph: Graph, node: Node, shared: str) -> None:
    queries, result = node.inputs[0], node.outputs[0]
    shape, out = graph.shape(queries), graph.shape(result)
    groups = graph.shape(shared)[1]
    heads, length = shape[1], shape[2]
    assert isinstance(groups, int)
    assert isinstance(heads, int)
    share = heads // groups
    rows = share * length if isinstance(length, int) else f"{share}*{length}"
    place = graph.nodes.index(node)
    first = len(graph.nodes)
    folded = reshaped(graph, queries, (shape[0], groups, rows, shape[3]))
    _move(graph, first, place, node.scope)
    product = graph.fresh("folded")
    graph.shapes[product] = (out[0], groups, rows, out[3])
    node.inputs, node.outputs = (folded, shared), (product,)
    first = len(graph.nodes)
    target = graph.ints(*reshape_target(graph.shape(product), out))
    graph.nodes.append(Node("Reshape", (product, target), (result,)))
    _move(graph, first, place + 2, node.scope)


def scale_at_rank(graph: Graph) -> int:
    """Scale a LoRA branch between its factors; return how many were found.

    (x A^T B^T) s becomes (x A^T s) B^T: the same by linearity, on [rows, rank] values instead of
    [rows, d_out], forward and backward.
    """
    producers = graph.producers()
    uses = _uses(graph)
    inputs = graph.input_names()
    count = 0
    for node in list(graph.nodes):
        for value, scale in _pairs(node, "Mul"):
            product = producers.get(value)
            if product is None or scale not in inputs or graph.shape(scale) != ():
                continue
            if product.op != "FusedMatMul" or uses[value] != 1:
                continue
            hidden, weight = product.inputs
            if isinstance(graph.shape(weight)[-1], int):
                continue
            first = len(graph.nodes)
            scaled = graph.emit("Mul", hidden, scale, shape=graph.shape(hidden))
            _move(graph, first, graph.nodes.index(node), node.scope)
            node.op, node.domain, node.inputs = product.op, product.domain, (scaled, weight)
            node.attributes = dict(product.attributes)
            node.scope = product.scope
            count += 1
            break
    remove_dead(graph)
    return count


def _move(graph: Graph, first: int, place: int, scope: str) -> None:
    """Move the nodes emitted since position ``first`` to ``place``, into a module."""
    moved = graph.nodes[first:]
    del graph.nodes[first:]
    for node in moved:
        node.scope = scope
    graph.nodes[place:place] = moved


def _pairs(node: Node | None, op: str = "") -> Sequence[tuple[str, str]]:
    """The inputs of a node of two inputs, both ways round; none if it is another operator."""
    if node is None or (op and node.op != op) or len(node.inputs) != 2:
        return ()
    a, b = node.inputs
    return ((a, b), (b, a))


def _argument(producers: Mapping[str, Node], name: str, op: str) -> str:
    """First input of the node that makes a value, if it is this operator; else nothing."""
    node = producers.get(name)
    return node.inputs[0] if node is not None and node.op == op else ""


def _scalar(graph: Graph, name: str) -> float | None:
    """The value of a constant of one element."""
    value = graph.constants.get(name)
    return float(np.asarray(value).item()) if value is not None and value.size == 1 else None


def _uses(graph: Graph) -> dict[str, int]:
    """How often each value is read, by nodes and as an output."""
    uses: dict[str, int] = {}
    for name in (
        *(name for node in graph.nodes for name in node.inputs),
        *(port.name for port in graph.outputs),
    ):
        uses[name] = uses.get(name, 0) + 1
    return uses
