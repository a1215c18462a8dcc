# SPDX-License-Identifier: Apache-2.0
"""Each fusion finds its nodes, computes the same, and leaves alone what only looks like them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile.fusions import (
    fix_reshapes,
    fold_query_heads,
    fuse_forward,
    fuse_products,
    fuse_rms_norm,
    fuse_rotary,
    fuse_silu,
    scale_at_rank,
)
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port, Shape
from lorikit.server.compile.onnx_format import to_onnx

F32 = np.dtype(np.float32)


def graph_of(**shapes: Shape) -> Graph:
    graph = Graph(shapes=dict(shapes))
    graph.inputs = [Port(name, F32, shape) for name, shape in shapes.items()]
    return graph


def returning(graph: Graph, name: str) -> Graph:
    graph.outputs = [Port(name, F32, graph.shape(name))]
    return graph


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def run(graph: Graph, sizes: Mapping[str, int]) -> np.ndarray:
    """The output for inputs of fixed random numbers."""
    rng = np.random.default_rng(2)
    feeds = {
        port.name: np.asarray(
            rng.normal(size=[n if isinstance(n, int) else sizes[n] for n in port.shape]),
            np.float32,
        )
        for port in graph.inputs
    }
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    (value,) = session.run(None, feeds)
    return np.asarray(value)


def same(before: Graph, after: Graph, **sizes: int) -> None:
    # Another order of float32 operations moves the last bits.
    np.testing.assert_allclose(run(before, sizes), run(after, sizes), rtol=1e-5, atol=1e-6)


def rms_norm(axis: int = -1) -> Graph:
    graph = graph_of(x=("batch", "length", 8), w=(8,))
    shape: Shape = ("batch", "length", 8)
    row: Shape = ("batch", "length", 1)
    square = graph.emit("Pow", "x", graph.floats(2.0), shape=shape)
    mean = graph.emit("ReduceMean", square, graph.ints(axis), shape=row, keepdims=1)
    total = graph.emit("Add", mean, graph.floats(1e-5), shape=row)
    root = graph.emit("Sqrt", total, shape=row)
    inverse = graph.emit("Reciprocal", root, shape=row)
    normed = graph.emit("Mul", "x", inverse, shape=shape)
    return returning(graph, graph.emit("Mul", "w", normed, shape=shape))


def test_an_rms_norm_becomes_one_node() -> None:
    graph = rms_norm()
    before = graph.copy()

    assert fuse_rms_norm(graph) == 1
    assert operators(graph) == ["SimplifiedLayerNormalization"]
    same(before, graph, batch=2, length=3)


def test_a_mean_over_another_axis_is_no_rms_norm() -> None:
    graph = rms_norm(axis=1)

    assert fuse_rms_norm(graph) == 0
    assert len(graph.nodes) == 7


@pytest.mark.parametrize("is_swapped", [False, True])
def test_silu_becomes_one_node(is_swapped: bool) -> None:
    graph = graph_of(x=("batch", 8))
    gate = graph.emit("Sigmoid", "x", shape=("batch", 8))
    factors = (gate, "x") if is_swapped else ("x", gate)
    returning(graph, graph.emit("Mul", *factors, shape=("batch", 8)))
    before = graph.copy()

    assert fuse_silu(graph) == 1
    assert operators(graph) == ["QuickGelu"]
    same(before, graph, batch=3)


def test_a_gate_of_another_value_is_no_silu() -> None:
    graph = graph_of(x=("batch", 8), g=("batch", 8))
    gate = graph.emit("Sigmoid", "g", shape=("batch", 8))
    returning(graph, graph.emit("Mul", "x", gate, shape=("batch", 8)))

    assert fuse_silu(graph) == 0


def rotary(halves: tuple[str, str] = ("angle", "angle")) -> Graph:
    """As transformers writes it: x cos + concat(-x[4:], x[:4]) sin, tables [1, length, 8]."""
    angles: Shape = (1, "length", 4)
    graph = graph_of(x=("batch", 2, "length", 8), angle=angles, other=angles)
    table: Shape = (1, "length", 8)
    wide = graph.emit("Concat", *halves, shape=table, axis=-1)
    tables = []
    for op in ("Cos", "Sin"):
        values = graph.emit(op, wide, shape=table)
        tables.append(graph.emit("Unsqueeze", values, graph.ints(1), shape=(1, 1, "length", 8)))
    shape, half = graph.shape("x"), (*graph.shape("x")[:-1], 4)
    straight = graph.emit("Mul", "x", tables[0], shape=shape)
    last, step = graph.ints(3), graph.ints(1)
    lower = graph.emit("Slice", "x", graph.ints(0), graph.ints(4), last, step, shape=half)
    upper = graph.emit("Slice", "x", graph.ints(4), graph.ints(2**63 - 1), last, step, shape=half)
    turned = graph.emit("Concat", graph.emit("Neg", upper, shape=half), lower, shape=shape, axis=-1)
    crossed = graph.emit("Mul", turned, tables[1], shape=shape)
    return returning(graph, graph.emit("Add", straight, crossed, shape=shape))


def test_a_rotary_embedding_becomes_one_node_and_its_tables_halves() -> None:
    graph = rotary()
    graph.inputs.pop()
    before = graph.copy()

    assert fuse_rotary(graph) == 1
    assert operators(graph)[-1] == "RotaryEmbedding"
    assert graph.shape(graph.nodes[-1].inputs[2]) == ("length", 4)
    same(before, graph, batch=2, length=5)


def test_tables_of_two_different_halves_are_left_alone() -> None:
    assert fuse_rotary(rotary(("angle", "other"))) == 0


def test_scores_are_one_scaled_product() -> None:
    graph = graph_of(q=("batch", 2, "length", 4), k=("batch", 2, "length", 4))
    scores: Shape = ("batch", 2, "length", "length")
    turned = graph.emit("Transpose", "k", shape=("batch", 2, 4, "length"), perm=(0, 1, 3, 2))
    product = graph.emit("MatMul", "q", turned, shape=scores)
    returning(graph, graph.emit("Mul", product, graph.floats(0.5), shape=scores))
    before = graph.copy()

    assert fuse_products(graph) == 1
    assert operators(graph) == ["FusedMatMul"]
    same(before, graph, batch=2, length=3)


def test_a_product_that_is_read_unscaled_too_keeps_its_scale_apart() -> None:
    graph = graph_of(a=(2, 3), b=(3, 3))
    product = graph.emit("MatMul", "a", "b", shape=(2, 3))
    scaled = graph.emit("Mul", product, graph.floats(0.5), shape=(2, 3))
    returning(graph, graph.emit("Add", product, scaled, shape=(2, 3)))

    assert fuse_products(graph) == 0


def grouped_scores() -> Graph:
    """Six query heads share two key heads."""
    graph = graph_of(q=("batch", 6, "length", 4), k=("batch", 2, "length", 4))
    graph.inputs.append(Port("lengths", np.dtype(np.int64), (5,)))
    single = graph.emit("Unsqueeze", "k", graph.ints(2), shape=("batch", 2, 1, "length", 4))
    repeated = graph.emit("Expand", single, "lengths", shape=("batch", 2, 3, "length", 4))
    keys = graph.emit("Reshape", repeated, graph.ints(0, 6, -1, 4), shape=("batch", 6, "length", 4))
    attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
    graph.nodes.append(Node("FusedMatMul", ("q", keys), ("scores",), attributes, MICROSOFT))
    graph.shapes["scores"] = ("batch", 6, "length", "length")
    return returning(graph, "scores")


def test_shared_keys_are_multiplied_without_repeating_them() -> None:
    graph = grouped_scores()

    assert fold_query_heads(graph) == 1
    assert operators(graph) == ["Reshape", "FusedMatMul", "Reshape"]
    graph.inputs.pop()
    rng = np.random.default_rng(2)
    q = rng.normal(size=(2, 6, 3, 4)).astype(np.float32)
    k = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    expected = q @ np.repeat(k, 3, axis=1).transpose(0, 1, 3, 2)
    np.testing.assert_allclose(run(graph, {"batch": 2, "length": 3}), expected, atol=1e-5)


def test_a_transposed_left_factor_is_not_folded() -> None:
    graph = grouped_scores()
    graph.nodes[-1].attributes = {"transA": 1, "transB": 0, "alpha": 1.0}

    assert fold_query_heads(graph) == 0


def lora_branch() -> Graph:
    graph = graph_of(x=("batch", 8), a=("rank_0", 8), b=(6, "rank_0"), lora_scale=())
    attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
    graph.nodes.append(Node("FusedMatMul", ("x", "a"), ("h",), attributes, MICROSOFT))
    graph.nodes.append(Node("FusedMatMul", ("h", "b"), ("y",), attributes, MICROSOFT))
    graph.shapes |= {"h": ("batch", "rank_0"), "y": ("batch", 6)}
    return returning(graph, graph.emit("Mul", "y", "lora_scale", shape=("batch", 6)))


def test_the_scale_of_lora_moves_between_its_factors() -> None:
    graph = lora_branch()
    before = graph.copy()

    assert scale_at_rank(graph) == 1
    assert operators(graph) == ["FusedMatMul", "Mul", "FusedMatMul"]
    same(before, graph, batch=3, rank_0=2)


def test_a_branch_that_is_read_unscaled_too_is_left_alone() -> None:
    graph = lora_branch()
    graph.outputs.append(Port("y", F32, ("batch", 6)))

    assert scale_at_rank(graph) == 0


def test_a_reshape_says_its_shape_where_it_can() -> None:
    graph = graph_of(x=("batch", "length", 8))
    lengths = graph.emit("Shape", "x", shape=(2,), start=0, end=2)
    target = graph.emit("Concat", lengths, graph.ints(-1, 4), shape=(4,), axis=0)
    split = graph.emit("Reshape", "x", target, shape=("batch", "length", 2, 4), allowzero=1)
    returning(graph, split)
    before = graph.copy()

    assert fix_reshapes(graph) == 1
    assert operators(graph) == ["Reshape"]
    same(before, graph, batch=2, length=3)


def test_a_reshape_of_two_computed_lengths_stays() -> None:
    graph = graph_of(x=("batch", 2, "length", 8))
    lengths = graph.emit("Shape", "x", shape=(4,))
    folded = graph.emit("Reshape", "x", lengths, shape=("length", "batch", 2, 8))
    returning(graph, folded)

    assert fix_reshapes(graph) == 0


def test_every_fusion_reports_what_it_found() -> None:
    found = fuse_forward(rms_norm())

    assert found["fuse_rms_norm"] == 1
    assert found["fuse_silu"] == 0
