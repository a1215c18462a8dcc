# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.cleaning import fuse_linear, merge_equal, remove_dead
from lorikit.server.compile.graph import Graph, Node, Port, topological
from lorikit.server.compile.layers import keep_layers
from lorikit.server.compile.memory import peak_memory
from lorikit.server.errors import UnsupportedModelError

F32 = np.dtype(np.float32)
ARCHITECTURE = Architecture(class_name="Toy", layers="layer", head="head", targets=())


def stack(layers: int) -> Graph:
    """x -> (+ weight of layer i, then Tanh) for each layer -> y."""
    graph = Graph(inputs=[Port("x", F32, ("batch", 4))], shapes={"x": ("batch", 4)})
    stream = "x"
    graph.nodes.append(Node("Identity", ("x",), ("h",), scope="embedding"))
    graph.shapes["h"] = ("batch", 4)
    stream = "h"
    for i in range(layers):
        graph.constants[f"layer.{i}.w"] = np.full(4, i, np.float32)
        graph.nodes.append(Node("Add", (stream, f"layer.{i}.w"), (f"s{i}",), scope=f"layer.{i}"))
        graph.nodes.append(Node("Tanh", (f"s{i}",), (f"h{i}",), scope=f"layer.{i}.act"))
        graph.shapes |= {f"s{i}": ("batch", 4), f"h{i}": ("batch", 4)}
        stream = f"h{i}"
    graph.outputs.append(Port(stream, F32, ("batch", 4)))
    return graph


def test_dropped_layers_hand_the_stream_to_the_next_kept_one() -> None:
    graph = stack(4)

    keep_layers(graph, ARCHITECTURE, [0, 2], 4)

    assert [n.outputs[0] for n in graph.nodes] == ["h", "s0", "h0", "s2", "h2"]
    assert graph.producers()["s2"].inputs[0] == "h0"
    assert graph.outputs[0].name == "h2"
    assert set(graph.constants) == {"layer.0.w", "layer.2.w"}


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [4], [-1]])
def test_kept_layers_out_of_order_or_range_are_refused(kept: list[int]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"ascending and lie in 0\.\.3"):
        keep_layers(stack(4), ARCHITECTURE, kept, 4)


def test_a_layer_that_hands_on_two_values_is_refused() -> None:
    graph = stack(2)
    graph.nodes.append(Node("Add", ("s0", "h1"), ("z",), scope="head"))
    graph.outputs = [Port("z", F32, ("batch", 4))]

    with pytest.raises(UnsupportedModelError, match="hands on 2 values"):
        keep_layers(graph, ARCHITECTURE, [1], 2)


def test_dead_nodes_and_constants_go() -> None:
    graph = stack(1)
    graph.constants["unused"] = np.zeros(3, np.float32)
    graph.emit("Tanh", "x")

    assert remove_dead(graph) == 1
    assert "unused" not in graph.constants


def test_equal_expressions_are_computed_once_but_outputs_keep_their_names() -> None:
    graph = Graph(inputs=[Port("x", F32, (2,))])
    first = graph.emit("Tanh", "x", shape=(2,))
    second = graph.emit("Tanh", "x", shape=(2,))
    total = graph.emit("Add", first, second, shape=(2,))
    graph.nodes.append(Node("Tanh", ("x",), ("named",)))
    graph.outputs = [Port(total, F32, (2,)), Port("named", F32, (2,))]

    assert merge_equal(graph) == 1
    assert graph.producers()[total].inputs == (first, first)
    assert "named" in graph.producers()


def test_a_linear_map_reads_its_weight_without_a_transposed_copy() -> None:
    graph = Graph(inputs=[Port("x", F32, ("batch", 3, 5))], shapes={"x": ("batch", 3, 5)})
    graph.constants["w"] = np.ones((7, 5), np.float32)
    turned = graph.emit("Transpose", "w", shape=(5, 7), perm=(1, 0))
    y = graph.emit("MatMul", "x", turned, shape=("batch", 3, 7))
    graph.outputs = [Port(y, F32, ("batch", 3, 7))]

    assert fuse_linear(graph) == 1
    (node,) = graph.nodes
    assert node.op == "FusedMatMul"
    assert node.inputs == ("x", "w")


def test_topological_order_keeps_what_is_already_in_order() -> None:
    nodes = [Node("A", ("c",), ("a",)), Node("B", ("x",), ("b",)), Node("C", ("b",), ("c",))]

    assert [n.op for n in topological(nodes)] == ["B", "C", "A"]


def test_peak_counts_what_lives_at_the_same_time() -> None:
    graph = Graph(inputs=[Port("x", F32, ("batch", 10))], shapes={"x": ("batch", 10)})
    a = graph.emit("MatMul", "x", "x", shape=("batch", 10))
    b = graph.emit("MatMul", a, "x", shape=("batch", 10))
    c = graph.emit("MatMul", b, a, shape=("batch", 10))
    graph.outputs = [Port(c, F32, ("batch", 10))]

    # At the last node a, b and c live: three values of 10 floats for each of 2 rows.
    assert peak_memory(graph, {"batch": 2}).live_bytes == 3 * 10 * 2 * 4
