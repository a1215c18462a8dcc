# SPDX-License-Identifier: Apache-2.0
"""Each rule against finite differences in float64-like tolerance, on graphs of a few nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile.cleaning import merge_equal
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
    before, extra = kw.pop("before", lambda g: ()), kw.pop("extra", lambda g: ())
    attributes = {k: v for k, v in kw.items() if k not in ("domain",)}
    inputs = (*before(graph), *shapes, *extra(graph))
    graph.nodes.append(Node(op, inputs, ("y",), attributes, kw.get("domain", "")))
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


def axes(*numbers: int):
    return lambda graph: (graph.ints(*numbers),)


def statistics(graph: Graph, channels: int) -> tuple[str, str]:
    """Mean and variance of a batch norm."""
    mean = np.linspace(-0.2, 0.3, channels)
    return graph.constant(mean, np.float32), graph.constant(1 + mean, np.float32)


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
    "product of a batch and a wider one": (
        "MatMul",
        {"a": (3, 4, 5), "b": (2, 3, 5, 6)},
        (2, 3, 4, 6),
        {},
    ),
    "product of transposed factors": (
        "FusedMatMul",
        {"a": (2, 5, 4), "b": (2, 6, 5)},
        (2, 4, 6),
        {"domain": "com.microsoft", "transA": 1, "transB": 1, "alpha": 0.5},
    ),
    "product with a transposed left factor": (
        "FusedMatMul",
        {"a": (2, 5, 4), "b": (2, 5, 6)},
        (2, 4, 6),
        {"domain": "com.microsoft", "transA": 1, "transB": 0, "alpha": 2.0},
    ),
    "scaled linear map": (
        "FusedMatMul",
        {"a": (2, 4, 5), "b": (6, 5)},
        (2, 4, 6),
        {"domain": "com.microsoft", "transA": 0, "transB": 1, "alpha": 0.5},
    ),
    "gemm without transposing": ("Gemm", {"a": (4, 5), "b": (5, 6)}, (4, 6), {}),
    "softmax over an inner axis": ("Softmax", {"a": (2, 3, 5)}, (2, 3, 5), {"axis": 1}),
    "log softmax": ("LogSoftmax", {"a": (2, 3, 5)}, (2, 3, 5), {"axis": -1}),
    "rms norm": (
        "SimplifiedLayerNormalization",
        {"a": (2, 3, 8), "b": (8,)},
        (2, 3, 8),
        {"axis": -1, "epsilon": 1e-5},
    ),
    "batch norm": (
        "BatchNormalization",
        {"a": (2, 3, 4, 4), "b": (3,), "c": (3,)},
        (2, 3, 4, 4),
        {"epsilon": 1e-3, "extra": lambda g: statistics(g, 3)},
    ),
    "mean": ("ReduceMean", {"a": (2, 3, 5)}, (2, 1, 5), {"extra": axes(1), "keepdims": 1}),
    "mean of images": (
        "ReduceMean",
        {"a": (2, 3, 4, 4)},
        (2, 3),
        {"extra": axes(-1, -2), "keepdims": 0},
    ),
    "sum": ("ReduceSum", {"a": (2, 3, 5)}, (2, 3), {"extra": axes(2), "keepdims": 0}),
    "sum of all": ("ReduceSum", {"a": (2, 3)}, (), {"keepdims": 0}),
    "norm": ("ReduceL2", {"a": (3, 5)}, (3, 1), {"extra": axes(1), "keepdims": 1}),
    "global average": ("GlobalAveragePool", {"a": (2, 3, 4, 5)}, (2, 3, 1, 1), {}),
    "neg": ("Neg", {"a": (3, 4)}, (3, 4), {}),
    "abs": ("Abs", {"a": (3, 4)}, (3, 4), {}),
    "exp": ("Exp", {"a": (3, 4)}, (3, 4), {}),
    "log": ("Log", {"a": (3, 4)}, (3, 4), {"positive": True}),
    "sqrt": ("Sqrt", {"a": (3, 4)}, (3, 4), {"positive": True}),
    "reciprocal": ("Reciprocal", {"a": (3, 4)}, (3, 4), {"positive": True}),
    "square": ("Pow", {"a": (3, 4)}, (3, 4), {"extra": lambda g: (g.floats(2.0),)}),
    "cube": ("Pow", {"a": (3, 4)}, (3, 4), {"extra": lambda g: (g.floats(3.0),)}),
    "erf": ("Erf", {"a": (3, 4)}, (3, 4), {}),
    "sigmoid": ("Sigmoid", {"a": (3, 4)}, (3, 4), {}),
    "silu": ("QuickGelu", {"a": (3, 7)}, (3, 7), {"domain": "com.microsoft", "alpha": 1.0}),
    "gelu with tanh": ("Gelu", {"a": (3, 7)}, (3, 7), {"approximate": "tanh"}),
    "hard swish": ("HardSwish", {"a": (3, 7)}, (3, 7), {}),
    "hard sigmoid": ("HardSigmoid", {"a": (3, 7)}, (3, 7), {"alpha": 0.25, "beta": 0.5}),
    "clip": (
        "Clip",
        {"a": (4, 7)},
        (4, 7),
        {"extra": lambda g: (g.floats(-0.5), g.floats(0.5))},
    ),
    "clip from above": ("Clip", {"a": (4, 7)}, (4, 7), {"extra": lambda g: ("", g.floats(0.5))}),
    "sum of three": ("Sum", {"a": (2, 3), "b": (3,), "c": (2, 1)}, (2, 3), {}),
    "where": (
        "Where",
        {"a": (2, 3), "b": (3,)},
        (2, 3),
        {"before": lambda g: (g.constant([[True, False, True], [False] * 3], np.bool_),)},
    ),
    "expand": ("Expand", {"a": (2, 1, 4)}, (2, 3, 4), {"extra": lambda g: (g.ints(2, 3, 4),)}),
    "tile": ("Tile", {"a": (2, 1, 4)}, (6, 2, 4), {"extra": lambda g: (g.ints(3, 2, 1),)}),
    "concat": ("Concat", {"a": (2, 3), "b": (2, 4), "c": (2, 1)}, (2, 8), {"axis": 1}),
    "slice": (
        "Slice",
        {"a": (3, 6)},
        (3, 3),
        {"extra": lambda g: (g.ints(1), g.ints(4), g.ints(-1), g.ints(1))},
    ),
    "slice of the end": (
        "Slice",
        {"a": (3, 6)},
        (2, 4),
        {"extra": lambda g: (g.ints(-2, 0), g.ints(2**63 - 1, -2), g.ints(0, 1))},
    ),
    "rows of a table": (
        "Gather",
        {"a": (5, 4)},
        (2, 3, 4),
        {"axis": 0, "extra": lambda g: (g.constant([[0, 2, 2], [4, 0, 0]], np.int64),)},
    ),
    "elements": (
        "GatherElements",
        {"a": (2, 4)},
        (2, 3),
        {"axis": -1, "extra": lambda g: (g.constant([[0, 2, 2], [3, 0, 0]], np.int64),)},
    ),
    "pad": (
        "Pad",
        {"a": (2, 4)},
        (3, 6),
        {"extra": lambda g: (g.ints(1, 2, 0, 0), g.floats(0.0))},
    ),
    "cast": ("Cast", {"a": (2, 4)}, (2, 4), {"to": 1}),
    "flatten": ("Flatten", {"a": (2, 3, 4)}, (2, 12), {"axis": 1}),
    "convolution": (
        "Conv",
        {"a": (2, 3, 6, 5), "b": (4, 3, 3, 2), "c": (4,)},
        (2, 4, 6, 4),
        {"kernel_shape": (3, 2), "pads": (1, 0, 1, 0)},
    ),
    "strided convolution that leaves a rest": (
        "Conv",
        {"a": (2, 3, 8, 8), "b": (4, 3, 3, 3)},
        (2, 4, 3, 4),
        {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (0, 0, 0, 1)},
    ),
    "depthwise convolution": (
        "Conv",
        {"a": (2, 3, 8, 8), "b": (3, 1, 3, 3)},
        (2, 3, 4, 4),
        {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (0, 0, 1, 1), "group": 3},
    ),
    "grouped and dilated convolution": (
        "Conv",
        {"a": (2, 4, 7, 7), "b": (6, 2, 3, 3)},
        (2, 6, 3, 3),
        {"kernel_shape": (3, 3), "dilations": (2, 2), "group": 2},
    ),
    "convolution of a sequence": (
        "Conv",
        {"a": (2, 3, 9), "b": (2, 3, 4)},
        (2, 2, 3),
        {"kernel_shape": (4,), "strides": (2,)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rule_matches_central_differences(case: str) -> None:
    op, shapes, output, options = CASES[case]
    options = dict(options)
    positive = options.pop("positive", False)
    rng = np.random.default_rng(3)
    feeds = {
        name: np.asarray(rng.normal(size=shape) + 0.1, np.float32) for name, shape in shapes.items()
    }
    if op == "Div":
        feeds["b"] = np.abs(feeds["b"]) + 1
    if positive:
        feeds["a"] = np.abs(feeds["a"]) + 1
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


def test_two_tensors_with_one_gradient_both_get_it() -> None:
    graph = graph_of("Add", {"a": (2,), "b": (2,)}, (2,))
    graph.nodes.append(Node("Exp", ("y",), ("z",)))
    graph.shapes["z"] = (2,)

    add_gradients(graph, {"z": "dy"}, ["a", "b"])

    result = run(graph, {n: np.zeros(2, np.float32) for n in "ab"} | {"dy": np.ones(2, np.float32)})
    np.testing.assert_array_equal(result["a.grad"], [1.0, 1.0])
    np.testing.assert_array_equal(result["b.grad"], [1.0, 1.0])


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


def test_the_parts_of_a_split_give_their_gradients_back_in_place() -> None:
    graph = graph_of("Split", {"a": (2, 6)}, (2, 2), axis=1, num_outputs=3)
    graph.nodes[0].outputs = ("y", "unread", "z")
    graph.shapes |= {"unread": (2, 2), "z": (2, 2)}
    graph.outputs.append(Port("z", F32, (2, 2)))
    dy = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)

    add_gradients(graph, {"y": "dy", "z": "dy"}, ["a"])

    np.testing.assert_array_equal(
        run(graph, {"a": np.zeros((2, 6), np.float32), "dy": dy})["a.grad"],
        np.concatenate([dy, 0 * dy, dy], 1),
    )


def test_lengths_of_symbolic_axes_are_read_from_inputs() -> None:
    graph = Graph(inputs=[Port("x", F32, ("batch", "length"))], shapes={"x": ("batch", "length")})
    graph.inputs.append(Port("a", F32, (3,)))
    graph.shapes["a"] = (3,)
    wide = graph.emit("Unsqueeze", "x", graph.ints(2), shape=("batch", "length", 1))
    product = graph.emit("Mul", wide, "a", shape=("batch", "length", 3))
    mean = graph.emit("ReduceMean", product, graph.ints(1), shape=("batch", 3), keepdims=0)
    graph.outputs.append(Port(mean, F32, ("batch", 3)))
    graph.inputs.append(Port("dy", F32, ("batch", 3)))
    graph.shapes["dy"] = ("batch", 3)
    forward = len(graph.nodes)

    add_gradients(graph, {mean: "dy"}, ["a"])

    assert {n.inputs[0] for n in graph.nodes[forward:] if n.op == "Shape"} == {"x"}
    x = np.array([[1.0, 2.0, 6.0], [0.0, 1.0, 2.0]], np.float32)
    feeds = {"x": x, "a": np.ones(3, np.float32), "dy": np.ones((2, 3), np.float32)}
    np.testing.assert_allclose(run(graph, feeds)["a.grad"], [4.0, 4.0, 4.0])


def test_a_clipped_value_is_not_kept_for_its_gradient_but_a_mask_is() -> None:
    graph = graph_of("Relu", {"a": (2, 2)}, (2, 2))

    add_gradients(graph, {"y": "dy"}, ["a"])

    assert [node.op for node in graph.nodes] == ["Relu", "Greater", "Cast", "Mul"]
    assert graph.dtypes[graph.nodes[1].outputs[0]] == np.bool_


def test_a_form_without_a_rule_is_named_with_its_module() -> None:
    graph = graph_of("Slice", {"a": (3, 6)}, (3, 3), extra=lambda g: (g.ints(0), g.ints(6)) * 2)
    graph.nodes[0].inputs = ("a", *(graph.ints(n) for n in (0, 6, 1, 2)))
    graph.nodes[0].scope = "model.layers.3"

    with pytest.raises(UnsupportedModelError, match=r"Slice \(model\.layers\.3\) with steps"):
        add_gradients(graph, {"y": "dy"}, ["a"])


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("QuickGelu", {"alpha": 1.0}),
        ("Gelu", {}),
        ("Gelu", {"approximate": "none"}),
        ("SimplifiedLayerNormalization", {"axis": -1}),
        ("SimplifiedLayerNormalization", {"axis": 1}),
        ("LayerNormalization", {"axis": -1}),
    ],
)
def test_what_is_one_node_away_from_a_kept_value_is_made_again(
    op: str, attributes: dict[str, float | int | str]
) -> None:
    domain = "com.microsoft" if op == "QuickGelu" else ""
    is_norm = op.endswith("Normalization")
    graph = graph_of("Mul", {"x": (2, 3), "a": (2, 3), "w": (3,)}, (2, 3))
    inputs = ("x", "w") if is_norm else ("x",)
    graph.nodes = [Node(op, inputs, ("active",), attributes, domain)]
    graph.nodes.append(Node("Mul", ("active", "a"), ("y",)))
    graph.shapes["active"] = (2, 3)
    trained = ["x", "a", "w"] if is_norm else ["x", "a"]
    once = graph.copy()
    add_gradients(graph, {"y": "dy"}, trained)
    merge_equal(graph)

    backward = [node for node in graph.nodes if node.outputs[0] not in ("active", "y")]
    assert not any("active" in node.inputs for node in backward)
    rng = np.random.default_rng(8)
    feeds = {name: rng.normal(size=(2, 3)).astype(np.float32) for name in ("x", "a", "dy")}
    feeds["w"] = np.array([1.0, 2.0, 0.5], np.float32)
    once.outputs.append(Port("active", F32, (2, 3)))
    np.testing.assert_allclose(
        run(graph, feeds)["a.grad"], feeds["dy"] * run(once, feeds)["active"], rtol=1e-5
    )


def test_a_factor_of_symbolic_rank_sums_its_gradient_over_the_examples() -> None:
    shapes = {"a": ("batch", "length", 5), "b": ("rank_0", 5)}
    options = {"domain": "com.microsoft", "transA": 0, "transB": 1, "alpha": 0.5}
    graph = graph_of("FusedMatMul", shapes, ("batch", "length", "rank_0"), **options)
    add_gradients(graph, {"y": "dy"}, ["b"])
    rng = np.random.default_rng(3)
    a, dy = rng.normal(size=(2, 4, 5)), rng.normal(size=(2, 4, 3))
    feeds = {"a": a, "b": np.zeros((3, 5)), "dy": dy}

    result = run(graph, {name: value.astype(np.float32) for name, value in feeds.items()})

    expected = 0.5 * np.einsum("blr,bld->rd", dy, a)
    np.testing.assert_allclose(result["b.grad"], expected, rtol=1e-4, atol=1e-5)
    assert not any(node.op == "Reshape" for node in graph.nodes)


def test_a_prompt_before_a_text_of_any_length_gets_its_part_of_the_gradient() -> None:
    graph = graph_of("Concat", {"prompt": (2, 3), "x": ("length", 3)}, ("length + 2", 3), axis=0)
    text = graph.emit("Slice", "y", graph.ints(2), graph.ints(2**63 - 1), graph.ints(0))
    graph.shapes[text] = ("length", 3)
    graph.nodes.append(Node("Mul", (text, text), ("z",)))
    graph.shapes["z"] = ("length", 3)
    graph.inputs.append(Port("dz", F32, ("length", 3)))
    graph.shapes["dz"] = ("length", 3)
    rng = np.random.default_rng(6)
    arrays = {"prompt": (2, 3), "x": (4, 3), "dy": (6, 3), "dz": (4, 3)}
    feeds = {name: rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}

    add_gradients(graph, {"y": "dy", "z": "dz"}, ["prompt", "x"])
    result = run(graph, feeds)

    np.testing.assert_allclose(result["prompt.grad"], feeds["dy"][:2], rtol=1e-6)
    expected = feeds["dy"][2:] + 2 * feeds["x"] * feeds["dz"]
    np.testing.assert_allclose(result["x.grad"], expected, rtol=1e-5)
