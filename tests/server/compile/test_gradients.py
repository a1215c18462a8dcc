# SPDX-License-Identifier: Apache-2.0
"""Each rule against finite differences in float64-like tolerance, on graphs of a few nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile.gradients import add_gradients
from lorikit.server.compile.graph import Graph, Node, Port
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.errors import UnsupportedModelError

F32 = np.dtype(np.float32)


def graph_of(op: str, shapes: Mapping[str, tuple[int, ...]], output: tuple[int, ...], **kw):
    graph = Graph()
    for name, shape in shapes.items():
        graph.inputs.append(Port(name, F32, shape))
        graph.shapes[name] = shape
    extra = kw.pop("extra", ())
    attributes = {k: v for k, v in kw.items() if k not in ("domain",)}
    graph.nodes.append(
        Node(
            op,
            (*shapes, *(extra(graph) if extra else ())),
            ("y",),
            attributes,
            kw.get("domain", ""),
        )
    )
    graph.shapes["y"] = output
    graph.inputs.append(Port("dy", F32, output))
    graph.shapes["dy"] = output
    graph.outputs.append(Port("y", F32, output))
    return graph


def run(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    wanted = {port.name for port in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {k: v for k, v in feeds.items() if k in wanted})
    return dict(zip(names, values, strict=True))


CASES = {
    "add with broadcasting": ("Add", {"a": (2, 3, 4), "b": (4,)}, (2, 3, 4), {}),
    "add over a kept axis": ("Add", {"a": (2, 3, 4), "b": (2, 1, 4)}, (2, 3, 4), {}),
    "sub": ("Sub", {"a": (3, 4), "b": (3, 1)}, (3, 4), {}),
    "mul by a scalar": ("Mul", {"a": (2, 3), "b": ()}, (2, 3), {}),
    "div": ("Div", {"a": (2, 3), "b": (3,)}, (2, 3), {}),
    "batched matmul": ("MatMul", {"a": (2, 3, 4, 5), "b": (2, 3, 5, 6)}, (2, 3, 4, 6), {}),
    "matmul with one matrix": ("MatMul", {"a": (2, 4, 5), "b": (5, 6)}, (2, 4, 6), {}),
    "linear map": (
        "FusedMatMul",
        {"a": (2, 4, 5), "b": (6, 5)},
        (2, 4, 6),
        {"domain": "com.microsoft", "transA": 0, "transB": 1, "alpha": 1.0},
    ),
    "gemm with bias": ("Gemm", {"a": (4, 5), "b": (6, 5), "c": (6,)}, (4, 6), {"transB": 1}),
    "softmax": ("Softmax", {"a": (2, 3, 5)}, (2, 3, 5), {"axis": -1}),
    "layer norm": (
        "LayerNormalization",
        {"a": (2, 3, 8), "b": (8,), "c": (8,)},
        (2, 3, 8),
        {"axis": -1, "epsilon": 1e-5},
    ),
    "gelu": ("Gelu", {"a": (3, 7)}, (3, 7), {}),
    "tanh": ("Tanh", {"a": (3, 7)}, (3, 7), {}),
    "relu": ("Relu", {"a": (3, 7)}, (3, 7), {}),
    "transpose": ("Transpose", {"a": (2, 3, 4, 5)}, (2, 4, 5, 3), {"perm": (0, 2, 3, 1)}),
    "reshape": ("Reshape", {"a": (2, 3, 4)}, (6, 4), {"extra": lambda g: (g.ints(6, 4),)}),
    "first of an axis": (
        "Gather",
        {"a": (2, 5, 4)},
        (2, 4),
        {"axis": 1, "extra": lambda g: (g.constant(0, np.int64),)},
    ),
    "last of an axis": (
        "Gather",
        {"a": (2, 5, 4)},
        (2, 4),
        {"axis": 1, "extra": lambda g: (g.constant(-1, np.int64),)},
    ),
    "squeeze": ("Squeeze", {"a": (2, 1, 4)}, (2, 4), {"extra": lambda g: (g.ints(1),)}),
    "unsqueeze": ("Unsqueeze", {"a": (2, 4)}, (2, 1, 4), {"extra": lambda g: (g.ints(1),)}),
}


@pytest.mark.parametrize("case", CASES)
def test_rule_matches_central_differences(case: str) -> None:
    op, shapes, output, options = CASES[case]
    rng = np.random.default_rng(3)
    feeds = {
        name: np.asarray(rng.normal(size=shape) + 0.1, np.float32) for name, shape in shapes.items()
    }
    if op == "Div":
        feeds["b"] = np.abs(feeds["b"]) + 1
    direction = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    feeds["dy"] = rng.normal(size=output).astype(np.float32)
    graph = graph_of(op, shapes, output, **options)
    plain = graph.copy()
    add_gradients(graph, {"y": "dy"}, list(shapes))

    results = run(graph, feeds)
    slope = sum(float((results[f"{name}.grad"] * direction[name]).sum()) for name in shapes)

    # A central difference of step 1e-2 in float32 is good to about 1e-3 for these smooth functions.
    step = 1e-2
    moved = []
    for sign in (1, -1):
        shifted = {n: np.float32(feeds[n] + sign * step * direction[n]) for n in shapes}
        shifted = {n: np.asarray(v, np.float32) for n, v in shifted.items()}
        moved.append(
            float((run(plain, {**feeds, **shifted})["y"].astype(float) * feeds["dy"]).sum())
        )
    assert slope == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=5e-3, abs=5e-3)


def test_a_value_used_twice_gets_the_sum_of_both_gradients() -> None:
    graph = graph_of("Mul", {"a": (2, 2)}, (2, 2))
    graph.nodes[0].inputs = ("a", "a")
    add_gradients(graph, {"y": "dy"}, ["a"])
    a = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)

    result = run(graph, {"a": a, "dy": np.ones((2, 2), np.float32)})

    np.testing.assert_allclose(result["a.grad"], 2 * a)


def test_an_operator_without_a_rule_is_named() -> None:
    graph = graph_of("Celu", {"a": (2, 2)}, (2, 2))

    with pytest.raises(UnsupportedModelError, match="Celu"):
        add_gradients(graph, {"y": "dy"}, ["a"])


def test_a_trained_input_without_effect_is_named() -> None:
    graph = graph_of("Tanh", {"a": (2, 2)}, (2, 2))
    graph.inputs.append(Port("idle", F32, (2,)))

    with pytest.raises(UnsupportedModelError, match="idle has no effect"):
        add_gradients(graph, {"y": "dy"}, ["a", "idle"])


def test_nothing_below_the_lowest_trained_tensor_is_differentiated(tmp_path: Path) -> None:
    graph = graph_of("Tanh", {"a": (2, 2)}, (2, 2))
    graph.nodes.insert(0, Node("Sqrt", ("x",), ("root",)))
    graph.nodes.insert(1, Node("Add", ("root", "a"), ("sum",)))
    graph.nodes[2].inputs = ("sum",)
    graph.inputs.append(Port("x", F32, (2, 2)))
    for name in ("x", "root", "sum"):
        graph.shapes[name] = (2, 2)

    add_gradients(graph, {"y": "dy"}, ["a"])

    assert not any("x" in node.inputs for node in graph.nodes[3:])
