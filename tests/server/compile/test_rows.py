# SPDX-License-Identifier: Apache-2.0
"""One row is taken early, gives the same numbers, and stops where rows meet or are read twice."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile.dropout import SEED, add_dropout, write_dropout
from lorikit.server.compile.graph import MICROSOFT, Graph, Port, Shape
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.rows import select_rows_early

F32 = np.dtype(np.float32)
HIDDEN: Shape = ("batch", "length", 8)
SIZES = {"batch": 2, "length": 5, "rank": 3}
FACTOR = "layer.0.query.lora_A.weight"


def empty(**shapes: Shape) -> Graph:
    graph = Graph(shapes=dict(shapes))
    graph.inputs = [Port(name, F32, shape) for name, shape in shapes.items()]
    return graph


def linear(graph: Graph, x: str, width: int = 8) -> str:
    rng = np.random.default_rng(len(graph.nodes))
    weight = graph.constant(rng.normal(size=(width, graph.shape(x)[-1])), F32)
    shape = (*graph.shape(x)[:-1], width)
    return graph.emit("FusedMatMul", x, weight, shape=shape, domain=MICROSOFT, transB=1)


def heads(graph: Graph, x: str) -> str:
    split = graph.emit("Reshape", x, graph.ints(0, 0, 2, 4), shape=("batch", "length", 2, 4))
    return graph.emit("Transpose", split, shape=("batch", 2, "length", 4), perm=(0, 2, 1, 3))


def attention(graph: Graph, x: str) -> tuple[str, str]:
    """The stream behind an attention block, and the scores inside."""
    query, key, value = (heads(graph, linear(graph, x)) for _ in range(3))
    scores = graph.emit(
        "FusedMatMul", query, key, shape=("batch", 2, "length", "length"), domain=MICROSOFT,
        transB=1, alpha=0.5,
    )  # fmt: skip
    masked = graph.emit("Add", scores, "mask", shape=graph.shape(scores))
    shares = graph.emit("Softmax", masked, shape=graph.shape(scores), axis=-1)
    mixed = graph.emit("MatMul", shares, value, shape=("batch", 2, "length", 4))
    back = graph.emit("Transpose", mixed, shape=("batch", "length", 2, 4), perm=(0, 2, 1, 3))
    joined = graph.emit("Reshape", back, graph.ints(0, 0, 8), shape=HIDDEN)
    return graph.emit("Add", linear(graph, joined), x, shape=HIDDEN), scores


def classifier(graph: Graph, stream: str, row: int = 0) -> Graph:
    """Reads one row of the stream."""
    graph.emit("Gather", stream, graph.constant(row, np.int64), shape=("batch", 8), axis=1)
    graph.outputs = [Port(graph.nodes[-1].outputs[0], F32, ("batch", 8))]
    return graph


def layer(row: int = 0) -> tuple[Graph, str]:
    graph = empty(x=HIDDEN, mask=("batch", 1, "length", "length"))
    stream, scores = attention(graph, "x")
    ones, zeros = graph.constant(np.ones(8), F32, "scale"), graph.constant(np.zeros(8), F32, "bias")
    normed = graph.emit("LayerNormalization", stream, ones, zeros, shape=HIDDEN, axis=-1)
    wide = linear(graph, normed, 16)
    bent = graph.emit("Gelu", wide, shape=graph.shape(wide), domain=MICROSOFT)
    out = graph.emit("Add", linear(graph, bent), stream, shape=HIDDEN)
    return classifier(graph, out, row), scores


def run(graph: Graph) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    feeds = {
        port.name: np.asarray(
            rng.normal(size=[n if isinstance(n, int) else SIZES[n] for n in port.shape]), port.dtype
        )
        for port in graph.inputs
    }
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options)
    return [np.asarray(value) for value in session.run(None, feeds)]


@pytest.mark.parametrize("row", [0, 3, -1])
def test_all_but_keys_and_values_work_on_one_row(row: int) -> None:
    graph, scores = layer(row)
    before = run(graph)

    # Of 23 nodes all but the last; keys and values are three nodes each.
    assert len(graph.nodes) == 23
    assert select_rows_early(graph) == 23 - 1 - 2 * 3

    assert graph.shape(scores) == ("batch", 2, 1, "length")
    # Rows of a product are computed alike whatever their number; only the blocking may differ.
    np.testing.assert_allclose(run(graph)[0], before[0], rtol=1e-5, atol=1e-6)


def test_a_second_run_finds_nothing_more() -> None:
    graph, _ = layer()
    select_rows_early(graph)

    assert select_rows_early(graph) == 0


def test_a_length_that_a_reshape_states_becomes_one() -> None:
    graph = empty(x=("batch", 5, 8))
    apart = graph.emit("Reshape", "x", graph.ints(-1, 5, 2, 4), shape=("batch", 5, 2, 4))
    bent = graph.emit("Tanh", apart, shape=("batch", 5, 2, 4))
    again = graph.emit("Reshape", bent, graph.ints(-1, 5, 8), shape=("batch", 5, 8))
    classifier(graph, again)
    before = run(graph)

    assert select_rows_early(graph) == 3
    np.testing.assert_array_equal(run(graph)[0], before[0])


def test_a_value_that_others_read_whole_stays_whole() -> None:
    graph = empty(x=HIDDEN)
    first = linear(graph, "x")
    second = graph.emit("Tanh", first, shape=HIDDEN)
    classifier(graph, second)
    graph.outputs.append(Port(first, F32, HIDDEN))
    before = run(graph)

    assert select_rows_early(graph) == 1
    assert graph.shape(first) == HIDDEN
    for value, expected in zip(run(graph), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_two_rows_are_left_alone() -> None:
    graph = classifier(empty(x=HIDDEN), "x")
    graph.nodes.clear()
    bent = graph.emit("Tanh", "x", shape=HIDDEN)
    ends = [
        graph.emit("Gather", bent, graph.constant(n, np.int64), shape=("batch", 8), axis=1)
        for n in (0, -1)
    ]
    graph.outputs = [Port(name, F32, ("batch", 8)) for name in ends]

    assert select_rows_early(graph) == 0
    assert graph.shape(bent) == HIDDEN


@pytest.mark.parametrize(
    ("op", "attributes"), [("Softmax", {"axis": 1}), ("CumSum", {}), ("Transpose", {})]
)
def test_operators_that_join_rows_see_all_of_them(op: str, attributes: dict[str, int]) -> None:
    graph = empty(x=("batch", 8, 8) if op == "Transpose" else HIDDEN)
    shape = graph.shape("x")
    more = (graph.constant(1, np.int64),) if op == "CumSum" else ()
    if op == "Transpose":
        joined = graph.emit(op, "x", shape=shape, perm=(0, 2, 1))
        mixed = graph.emit("MatMul", "x", joined, shape=shape)
        joined = graph.emit("MatMul", mixed, "x", shape=shape)
    else:
        joined = graph.emit(op, "x", *more, shape=shape, **attributes)
    classifier(graph, graph.emit("Tanh", joined, shape=shape))
    before = run(graph)

    select_rows_early(graph)

    np.testing.assert_allclose(run(graph)[0], before[0], rtol=1e-5, atol=1e-6)


def test_dropout_drops_what_it_would_drop_of_all_rows() -> None:
    graph = empty(x=HIDDEN)
    graph.inputs.append(Port(FACTOR, F32, (3, 8)))
    graph.shapes[FACTOR] = (3, 8)
    low: Shape = ("batch", "length", 3)
    product = graph.emit("FusedMatMul", "x", FACTOR, shape=low, domain=MICROSOFT, transB=1)
    classifier(graph, linear(graph, product), 2)
    add_dropout(graph, 0.5)
    whole = graph.copy()

    assert select_rows_early(graph) == 2
    write_dropout(graph)
    write_dropout(whole)

    assert SEED in graph.input_names()
    np.testing.assert_allclose(run(graph)[0], run(whole)[0], rtol=1e-5, atol=1e-6)
