# SPDX-License-Identifier: Apache-2.0
"""Recomputation on a stack of small layers, run by onnxruntime before and after."""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.gradients import add_gradients
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port, needed
from lorikit.server.compile.memory import peak_memory
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.recompute import recompute_layers, recompute_scores

F32 = np.dtype(np.float32)
LAYERS = Architecture(class_name="Toy", layers="layer", head="head", targets=())
WIDTH = 4
ROW = ("batch", WIDTH)


def node(graph: Graph, layer: int, op: str, *inputs: str) -> str:
    return graph.emit(op, *inputs, shape=ROW, scope=f"layer.{layer}")


def attention_graph(layers: int) -> Graph:
    """h <- softmax((h w) (h w)^T) (h w) for each layer, w trained; loss as in training_graph."""
    rows, square = ("batch", "length", WIDTH), ("batch", "length", "length")
    graph = Graph(inputs=[Port("x", F32, rows)], shapes={"x": rows})
    stream = "x"
    for layer in range(layers):
        weight, scope = f"layer.{layer}.w", f"layer.{layer}"
        graph.inputs.append(Port(weight, F32, (WIDTH,)))
        graph.shapes[weight] = (WIDTH,)
        keys = graph.emit("Mul", stream, weight, shape=rows, scope=scope)
        scores = graph.emit(
            "FusedMatMul", keys, keys, shape=square, scope=scope, domain=MICROSOFT, transB=1
        )
        shares = graph.emit("Softmax", scores, shape=square, scope=scope, axis=-1)
        stream = graph.emit("MatMul", shares, keys, shape=rows, scope=scope)
    half_of_squares(graph, stream, rows)
    add_gradients(graph, {stream: stream}, [f"layer.{i}.w" for i in range(layers)])
    return graph


def half_of_squares(graph: Graph, stream: str, shape: tuple[str | int, ...]) -> None:
    square = graph.emit("Mul", stream, stream, shape=shape)
    total = graph.emit("ReduceSum", square, shape=(), keepdims=0)
    graph.nodes.append(Node("Mul", (total, graph.floats(0.5)), ("loss",)))
    graph.shapes["loss"] = ()
    graph.outputs.append(Port("loss", F32, ()))


def training_graph(layers: int) -> Graph:
    """h <- tanh(h * w)^2 for each layer, w trained; the loss is half the sum of squares."""
    graph = Graph(inputs=[Port("x", F32, ROW)], shapes={"x": ROW})
    graph.nodes.append(Node("Identity", ("x",), ("entry",), scope="embedding"))
    graph.shapes["entry"] = ROW
    stream = "entry"
    for layer in range(layers):
        weight = f"layer.{layer}.w"
        graph.inputs.append(Port(weight, F32, (WIDTH,)))
        graph.shapes[weight] = (WIDTH,)
        scaled = node(graph, layer, "Mul", stream, weight)
        bent = node(graph, layer, "Tanh", scaled)
        stream = node(graph, layer, "Mul", bent, bent)
    half_of_squares(graph, stream, ROW)
    add_gradients(graph, {stream: stream}, [f"layer.{i}.w" for i in range(layers)])
    return graph


def results(graph: Graph) -> list[bytes]:
    rng = np.random.default_rng(7)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    session = onnxruntime.InferenceSession(
        to_onnx(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    sizes = {"batch": 3, "length": 5}
    shapes = {p.name: [sizes.get(n, n) for n in p.shape] for p in graph.inputs}
    feeds = {name: rng.normal(1, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return [np.asarray(value).tobytes() for value in session.run(None, feeds)]


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [2, 0, 1], [0, 1, 2, 3]])
def test_loss_and_gradients_keep_their_bits(layers: list[int]) -> None:
    graph = training_graph(4)
    expected = results(graph)

    recompute_layers(graph, LAYERS, layers)

    assert results(graph) == expected


def clones(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if "/again" in n.outputs[0]]


def test_only_what_enters_a_recomputed_layer_lives_until_its_backward_part() -> None:
    graph = training_graph(3)

    (done,) = recompute_layers(graph, LAYERS, [1])

    # The layer's last Mul makes what leaves it, which the next layer needs: it is kept.
    assert [n.op for n in clones(graph)] == ["Mul", "Tanh"]
    assert (done.layer, done.nodes) == (1, 2)
    last_read = max(
        i for i, n in enumerate(graph.nodes) if set(n.inputs).intersection(done.released)
    )
    assert last_read < next(i for i, n in enumerate(graph.nodes) if n.outputs[0] == "loss")


def test_peak_falls_with_each_recomputed_layer() -> None:
    graphs = [training_graph(8) for _ in range(4)]
    for count, graph in zip((0, 2, 4, 6), graphs, strict=True):
        recompute_layers(graph, LAYERS, range(count))

    peaks = [peak_memory(graph, {"batch": 1000}).live_bytes for graph in graphs]

    # A layer keeps what enters it and the value of its Tanh; recomputed, only what enters it.
    two_layers = 2 * 1000 * WIDTH * 4
    assert [a - b for a, b in itertools.pairwise(peaks)] == [two_layers] * 3


def test_clones_run_only_after_the_backward_part_of_the_layer_above() -> None:
    graph = training_graph(2)

    recompute_layers(graph, LAYERS, [0, 1])

    scopes = [n.scope for n in graph.nodes]
    first_clone_below = graph.nodes.index(next(n for n in clones(graph) if n.scope == "layer.0"))
    assert [n.scope for n in clones(graph)] == ["layer.1", "layer.1", "layer.0", "layer.0"]
    assert "layer.1" not in scopes[first_clone_below:]


def test_layer_without_backward_part_is_left_as_it_is() -> None:
    graph = training_graph(2)
    wanted = needed(graph, ["loss", "layer.1.w.grad"])
    graph.nodes = [n for n in graph.nodes if n.outputs[0] in wanted]
    nodes = list(graph.nodes)

    (done,) = recompute_layers(graph, LAYERS, [0])

    assert (done.nodes, done.released) == (0, ())
    assert graph.nodes == nodes


def test_lengths_are_read_early_and_random_numbers_are_drawn_once() -> None:
    graph = Graph(inputs=[Port("x", F32, ROW)], shapes={"x": ROW})
    noise = node(graph, 0, "RandomNormalLike", "x")
    noisy = node(graph, 0, "Mul", "x", noise)
    out = node(graph, 0, "Tanh", noisy)
    graph.nodes.append(Node("ReduceSum", (out,), ("loss",), {"keepdims": 0}))
    length = graph.emit("Shape", noisy, shape=(2,), scope="layer.0")
    again = graph.emit("Mul", noisy, noise, shape=ROW, scope="layer.0")
    graph.nodes.append(Node("Reshape", (again, length), ("x.grad",), scope="layer.0"))
    graph.outputs = [Port("loss", F32, ()), Port("x.grad", F32, ROW)]

    recompute_layers(graph, LAYERS, [0])

    ops = [n.op for n in graph.nodes]
    assert ops == [
        "RandomNormalLike", "Mul", "Shape", "Tanh", "ReduceSum", "Mul", "Mul", "Reshape",
    ]  # fmt: skip
    assert graph.nodes[5].inputs == ("x", noise)


@pytest.mark.parametrize("layers", [[], [1], [0, 1, 2]])
def test_loss_and_gradients_keep_their_bits_when_scores_are_made_again(layers: list[int]) -> None:
    graph = attention_graph(3)
    expected = results(graph)

    recompute_layers(graph, LAYERS, layers)
    recompute_scores(graph, LAYERS)

    assert results(graph) == expected


def test_scores_are_made_again_from_what_the_backward_part_reads_anyway() -> None:
    graph = attention_graph(2)

    done = recompute_scores(graph, LAYERS)

    assert [n.op for n in clones(graph)] == ["FusedMatMul", "Softmax"] * 2
    assert [(entry.layer, entry.nodes) for entry in done] == [(0, 2), (1, 2)]
    assert [n.scope for n in clones(graph)] == ["layer.1"] * 2 + ["layer.0"] * 2


def test_peak_no_longer_grows_with_the_scores_of_each_layer() -> None:
    sizes = {"batch": 1, "length": 1000}
    two, six = (attention_graph(layers) for layers in (2, 6))
    for graph in (two, six):
        recompute_scores(graph, LAYERS)

    growth = peak_memory(six, sizes).live_bytes - peak_memory(two, sizes).live_bytes

    # Four layers more keep keys and stream, [1000, WIDTH] each, and no [1000, 1000].
    assert growth <= 4 * 2 * 1000 * WIDTH * 4


def test_layers_recomputed_whole_make_no_scores_a_second_time() -> None:
    graph = attention_graph(2)
    recompute_layers(graph, LAYERS, [0, 1])
    count = len(graph.nodes)

    assert recompute_scores(graph, LAYERS) == ()
    assert len(graph.nodes) == count
