# SPDX-License-Identifier: Apache-2.0
"""Lifetimes by hand on small graphs, and against what onnxruntime's arena says it holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorikit.server.compile.arena import Arena, touched_bytes
from lorikit.server.compile.graph import Graph, Port
from lorikit.server.compile.memory import Lifetimes, in_running_order, peak_memory
from lorikit.server.compile.onnx_format import to_onnx

F32 = np.dtype(np.float32)
PAGE = 4096
KB = 1024
MB = 1 << 20
ROW = ("batch", 1024)


def graph_of(*ops: str) -> Graph:
    """A chain of operators on x [batch, 1024]; the first makes a value of its own."""
    graph = Graph(inputs=[Port("x", F32, ROW)], shapes={"x": ROW})
    value = "x"
    for op in ops:
        value = graph.emit(op, value, shape=ROW)
    graph.outputs = [Port(graph.emit("ReduceSum", value, shape=(), keepdims=0), F32, ())]
    return graph


@pytest.mark.parametrize(
    ("ops", "buffers"),
    [
        (("Exp",), 1),
        (("Exp", "Exp"), 2),
        (("Exp", "Tanh", "Softmax"), 1),
        (("Exp", "Identity", "Neg"), 2),
        (("Exp", "Gelu", "Neg", "Sqrt"), 2),
    ],
)
def test_only_some_operators_write_over_what_they_read(ops: tuple[str, ...], buffers: int) -> None:
    peak = peak_memory(graph_of(*ops), {"batch": 3})

    assert peak.live_bytes // (3 * 1024 * 4) == buffers


def test_an_input_that_is_read_again_is_not_written_over() -> None:
    graph = Graph(inputs=[Port("x", F32, (1000,))], shapes={"x": (1000,)})
    a = graph.emit("Exp", "x", shape=(1000,))
    b = graph.emit("Tanh", a, shape=(1000,))
    graph.outputs = [Port(graph.emit("Add", a, b, shape=(1000,)), F32, (1000,))]

    assert peak_memory(graph, {}).live_bytes == 3 * 4000  # a, b and their sum


def test_results_of_the_graph_live_to_its_end_and_are_never_shared() -> None:
    graph = Graph(inputs=[Port("x", F32, (1000,))], shapes={"x": (1000,)})
    a = graph.emit("Exp", "x", shape=(1000,))
    same = graph.emit("Identity", a, shape=(1000,))
    last = graph.emit("Exp", "x", shape=(1000,))
    graph.outputs = [Port(same, F32, (1000,)), Port(last, F32, (1000,))]

    peak = peak_memory(graph, {})

    assert (peak.live_bytes, peak.node) == (2 * 4000, same)


def test_weights_made_for_one_use_are_told_apart() -> None:
    graph = Graph(inputs=[Port("x", F32, ("batch", 8))], shapes={"x": ("batch", 8)})
    graph.constants["codes"] = np.zeros((8, 8), np.int8)
    graph.constants["scale"] = np.ones(8, np.float32)
    weight = graph.emit("DequantizeLinear", "codes", "scale", shape=(8, 8), axis=0)
    y = graph.emit("MatMul", "x", weight, shape=("batch", 8))
    graph.outputs = [Port(y, F32, ("batch", 8))]

    peak = peak_memory(graph, {"batch": 5})

    assert peak.workspace_bytes == 8 * 8 * 4
    assert peak.live_bytes == 8 * 8 * 4 + 5 * 8 * 4


def test_what_a_kernel_asks_for_while_it_runs_counts_too() -> None:
    graph = graph_of("Exp")
    chosen = graph.emit("Where", "condition", graph.nodes[0].outputs[0], "x", shape=ROW)
    graph.outputs = [Port(chosen, F32, ROW)]

    # Its first operand, its result, and two copies with the other operand's places at zero.
    assert peak_memory(graph, {"batch": 3}).live_bytes == 4 * 3 * 4096


def test_lengths_are_read_as_soon_as_they_can_be() -> None:
    graph = graph_of("Exp", "Exp", "Exp")
    graph.emit("Shape", graph.nodes[0].outputs[0], shape=(2,))

    assert [n.op for n in in_running_order(graph.nodes)][:2] == ["Exp", "Shape"]
    assert peak_memory(graph, {"batch": 2}).live_bytes == 2 * 2 * 1024 * 4


def test_codes_lengths_and_truths_count_as_wide_as_they_are() -> None:
    graph = Graph(inputs=[Port("rows", np.dtype(np.int64), (64,))], shapes={"rows": (64,)})
    graph.constants["codes"] = np.zeros((100, 8), np.int8)
    codes = graph.emit("Gather", "codes", "rows", shape=(64, 8), axis=0)
    half = graph.emit("Cast", codes, shape=(64, 8), to=10)
    wide = graph.emit("Cast", half, shape=(64, 8), to=1)
    hit = graph.emit("Greater", wide, graph.floats(0.0), shape=(64, 8))
    graph.outputs = [Port(hit, np.dtype(np.bool_), (64, 8))]

    sizes = [size for _, size in Lifetimes(graph).events({}) if size >= 0]

    assert sizes == [512, 1024, 2048, 512]


def test_peak_grows_with_each_size_as_the_shapes_say() -> None:
    lifetimes = Lifetimes(graph_of("Exp", "Exp"))

    peaks = [lifetimes.peak({"batch": batch}).live_bytes for batch in (1, 2, 7)]

    assert peaks == [2 * 4096, 2 * 2 * 4096, 2 * 7 * 4096]


def test_events_ask_and_return_in_the_order_of_the_nodes() -> None:
    events = list(Lifetimes(graph_of("Exp", "Neg")).events({"batch": 1}))

    assert events == [(0, 4096), (1, 4096), (0, -1), (2, 4), (1, -1)]


def test_arena_serves_small_requests_from_one_region() -> None:
    assert touched_bytes([(0, 10), (1, 10), (0, -1), (2, 300)]) == PAGE


def test_arena_does_not_split_a_chunk_that_is_less_than_twice_the_request() -> None:
    # Regions of 1 MB, 2 MB: 700 KB takes the whole first one, though 300 KB would be left.
    arena = Arena()
    first, second = arena.allocate(700 * KB), arena.allocate(200 * KB)

    assert first != second
    assert abs(second - first) > MB


def test_arena_merges_what_is_given_back() -> None:
    arena = Arena()
    chunks = [arena.allocate(200 * KB) for _ in range(4)]
    for chunk in chunks[1:3]:
        arena.release(chunk)

    assert arena.allocate(400 * KB) == chunks[1]


def test_results_of_a_run_are_held_through_the_next() -> None:
    one = [(0, 100 * PAGE)]

    assert touched_bytes(one, one) == 200 * PAGE
    assert touched_bytes(one, one, one) == 200 * PAGE


STEP = """
import sys
import numpy, onnxruntime
onnxruntime.set_default_logger_severity(1)
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
options.enable_mem_pattern = options.enable_mem_reuse = False
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.ones((int(sys.argv[2]), 1024), numpy.float32)})
"""


@pytest.mark.parametrize("rows", [10, 300, 1000])
def test_regions_are_those_that_onnxruntime_logs(rows: int, tmp_path: Path) -> None:
    graph = graph_of("Exp", "Tanh", "Neg", "Gelu", "Sqrt", "Erf")
    y = graph.emit("Mul", graph.nodes[0].outputs[0], graph.nodes[4].outputs[0], shape=ROW)
    graph.outputs.append(Port(y, F32, ROW))
    (tmp_path / "graph.onnx").write_bytes(to_onnx(graph).SerializeToString())

    done = subprocess.run(
        [sys.executable, "-c", STEP, str(tmp_path / "graph.onnx"), str(rows)],
        capture_output=True,
        text=True,
        check=True,
    )

    logged = [int(n) for n in re.findall(r"Extended allocation by (\d+) bytes", done.stderr)]
    arena = Arena()
    held: dict[int, int] = {}
    for buffer, size in Lifetimes(graph).events({"batch": rows}):
        if size >= 0:
            held[buffer] = arena.allocate(size)
        else:
            arena.release(held.pop(buffer))
    assert list(arena.region_bytes()) == logged
