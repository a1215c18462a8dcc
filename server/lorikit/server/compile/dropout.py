# SPDX-License-Identifier: Apache-2.0
"""LoRA dropout that any runtime repeats bit for bit.

A random operator's numbers belong to the runtime that draws them. Here the graph computes them
from its input ``dropout_seed`` with whole numbers alone: a key for each row of a value, a key for
each column, and a value is dropped where the lower 31 bits of their product are small. So one seed
gives one mask everywhere, and the backward pass makes the mask again instead of keeping it.

A mask depends on the seed, on the name of the module and on the place of a value, not on the size
of the batch. Within one row the column keys are fixed numbers, so that a row's mask is one of about
2^30; that is ample for dropout, and not meant for cryptography.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorikit.server.compile.gradients.parts import length
from lorikit.server.compile.graph import Attribute, Graph, Node, Port, Shape
from lorikit.server.errors import UnsupportedModelError

SEED = "dropout_seed"
"""Graph input, int64 []; from 0 to 2^62."""

OPERATOR = "LoraDropout"
"""Stands for the nodes of one mask until ``write_dropout``; it never leaves the compiler."""

_BITS = 31
_MASK: int = 2**31 - 1

_ROUNDS = ((0x2C1B3C6D, 12), (0x297A2D39, 15), (0x1B56C4E9, 13))
"""Odd multipliers below 2^31, each with the shift of the exclusive or that follows it.

Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators",
https://doi.org/10.1145/2660193.2660195, for the alternation; the numbers fit products of 62 bits.
"""

Int64 = npt.NDArray[np.int64]


def add_dropout(graph: Graph, probability: float) -> int:
    """Drop inputs of every LoRA factor A with a probability, as PEFT does; how many were found.

    To run on a forward graph before ``add_gradients``. What stays is scaled by 1 / (1 - p), which
    the product with A does. Adds the input ``dropout_seed`` int64 [] if there is anything to drop.

    Args:
        graph: Forward graph; changed in place.
        probability: Of a value to be dropped, p, from 0 (no change) to below 1.

    Raises:
        UnsupportedModelError: A factor A is not that of a linear map; or p is out of range.

    Source: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html, section 10
    (inverted form); Hu et al. 2021, https://arxiv.org/abs/2106.09685, appendix D, for its place.
    """
    if not 0 <= probability < 1:
        raise UnsupportedModelError(f"dropout must be at least 0 and below 1, got {probability}")
    if probability == 0:
        return 0
    nodes: list[Node] = []
    count = 0
    inputs = graph.input_names()
    for node in graph.nodes:
        weight = next((n for n in node.inputs if ".lora_A." in n and n in inputs), None)
        if weight is not None:
            nodes.append(_dropped(graph, node, weight, probability))
            count += 1
        nodes.append(node)
    graph.nodes = nodes
    if count:
        graph.inputs.append(Port(SEED, np.dtype(np.int64), ()))
        graph.shapes[SEED] = ()
        graph.dtypes[SEED] = np.dtype(np.int64)
    return count


def _dropped(graph: Graph, node: Node, weight: str, probability: float) -> Node:
    """A node that drops from the input of a product with A, which then scales what stays."""
    if node.op != "FusedMatMul" or node.inputs[1] != weight:
        raise UnsupportedModelError(
            f"dropout before {weight}, an input of {node.op}, is not possible; "
            "LoRA on linear maps has it, for this module set the dropout to 0"
        )
    x = node.inputs[0]
    kept = graph.fresh("dropped")
    graph.shapes[kept] = graph.shape(x)
    alpha = node.attributes.get("alpha", 1.0)
    assert isinstance(alpha, (int, float))
    node.inputs = (kept, weight)
    node.attributes = {**node.attributes, "alpha": alpha / (1 - probability)}
    attributes: dict[str, Attribute] = {"module": weight, "probability": probability}
    return Node(OPERATOR, (x,), (kept,), attributes, scope=node.scope)


def write_dropout(graph: Graph) -> int:
    """Put the nodes of each mask in place of ``LoraDropout``; return how many there were.

    To run after the last ``merge_equal``: forward and backward make their masks apart.
    """
    keys: dict[Shape, str] = {}
    nodes = graph.nodes
    graph.nodes = []
    prologue: list[Node] = []
    count = 0
    for node in nodes:
        if node.op != OPERATOR:
            graph.nodes.append(node)
            continue
        first = len(graph.nodes)
        leading = graph.shape(node.inputs[0])[:-1]
        if leading not in keys:
            keys[leading] = _row_keys(graph, node.inputs[0])
            prologue += graph.nodes[first:]
            del graph.nodes[first:]
        _write_mask(graph, node, keys[leading])
        for written in graph.nodes[first:]:
            written.scope = node.scope
        count += 1
    graph.nodes = [*prologue, *graph.nodes]
    return count


def _write_mask(graph: Graph, node: Node, rows: str) -> None:
    module, probability = node.attributes["module"], node.attributes["probability"]
    assert isinstance(module, str)
    assert isinstance(probability, float)
    shape = graph.shape(node.inputs[0])
    width = shape[-1]
    assert isinstance(width, int)
    own = _whole(graph, "Mul", rows, graph.constant(_module_key(module), np.int64))
    own = _whole(graph, "BitwiseAnd", own, graph.constant(_MASK, np.int64))
    columns = f"dropout_columns:{width}"
    graph.constants.setdefault(columns, _column_keys(width))
    product = _whole(graph, "Mul", own, columns, shape=shape)
    number = _whole(graph, "BitwiseAnd", product, graph.constant(_MASK, np.int64))
    limit = graph.constant(_limit(probability), np.int64)
    keep = graph.emit("GreaterOrEqual", number, limit, shape=shape)
    graph.dtypes[keep] = np.dtype(np.bool_)
    factor = graph.emit("Cast", keep, shape=shape, to=1)
    graph.nodes.append(Node("Mul", (node.inputs[0], factor), node.outputs))


def _row_keys(graph: Graph, x: str) -> str:
    """A key for each row of a value, from the seed and the number of the row: [..., 1]."""
    leading = graph.shape(x)[:-1]
    lengths = [length(graph, x, axis) for axis in range(len(leading))]
    total = lengths[0]
    for other in lengths[1:]:
        total = _whole(graph, "Mul", total, other)
    size = graph.emit("Squeeze", total, graph.ints(0), shape=())
    zero, one = (graph.constant(n, np.int64) for n in (0, 1))
    numbers = _whole(graph, "Range", zero, size, one, shape=("rows",))
    upper = _whole(graph, "Div", SEED, graph.constant(_MASK + 1, np.int64))
    seed = _mixed(graph, _mixed(graph, upper, SEED), graph.constant(1, np.int64))
    key = _mixed(graph, numbers, seed)
    odd = _whole(graph, "BitwiseOr", key, one)
    shape = graph.emit("Concat", *lengths, graph.ints(1), shape=(len(lengths) + 1,), axis=0)
    return _whole(graph, "Reshape", odd, shape, shape=(*leading, 1))


def _mixed(graph: Graph, value: str, other: str) -> str:
    """As ``_mix`` of the sum of two values, in the graph."""
    mask = graph.constant(_MASK, np.int64)
    shape = graph.shape(value)
    z = _whole(graph, "BitwiseAnd", value, mask, shape=shape)
    z = _whole(graph, "Add", z, _whole(graph, "BitwiseAnd", other, mask), shape=shape)
    for multiplier, shift in _ROUNDS:
        product = _whole(graph, "Mul", z, graph.constant(multiplier, np.int64), shape=shape)
        z = _whole(graph, "BitwiseAnd", product, mask, shape=shape)
        upper = _whole(graph, "Div", z, graph.constant(2**shift, np.int64), shape=shape)
        z = _whole(graph, "BitwiseXor", z, upper, shape=shape)
    return z


def _whole(graph: Graph, op: str, *inputs: str, shape: Shape | None = None) -> str:
    """Emit a node of whole numbers, in the shape of its first input unless said otherwise."""
    name = graph.emit(op, *inputs, shape=graph.shape(inputs[0]) if shape is None else shape)
    graph.dtypes[name] = np.dtype(np.int64)
    return name


def dropout_mask(
    seed: int, module: str, shape: Sequence[int], probability: float
) -> npt.NDArray[np.bool_]:
    """Which values a graph keeps: the same numbers in numpy, to check a graph against.

    Args:
        seed: As fed to ``dropout_seed``.
        module: Name of the module's tensor A, for example ``layer.0.query.lora_A.weight``.
        shape: Of the module's input, [..., d_in].
        probability: Of a value to be dropped.
    """
    whole = np.asarray(seed, np.int64)
    start = _mix(_mix(whole >> _BITS, whole), np.asarray(1, np.int64))
    rows = _mix(np.arange(np.prod(shape[:-1], dtype=np.int64)), start) | 1
    own = (rows * _module_key(module) & _MASK).reshape(*shape[:-1], 1)
    keep: npt.NDArray[np.bool_] = (own * _column_keys(shape[-1]) & _MASK) >= _limit(probability)
    return keep


def _mix(value: Int64, other: Int64) -> Int64:
    """A number below 2^31 that looks random, from the sum of two."""
    z: Int64 = (value & _MASK) + (other & _MASK)
    for multiplier, shift in _ROUNDS:
        z = z * multiplier & _MASK
        z = z ^ (z >> shift)
    return z


def _module_key(module: str) -> int:
    key = _mix(np.asarray(zlib.crc32(module.encode())), np.asarray(2))
    return int(key.item()) | 1


def _column_keys(width: int) -> Int64:
    return _mix(np.arange(width, dtype=np.int64), _mix(np.asarray(3), np.asarray(0))) | 1


def _limit(probability: float) -> int:
    return round(probability * (_MASK + 1))
