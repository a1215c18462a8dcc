# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile import run_graph
from lorikit.server.compile.cleaning import merge_equal, remove_dead
from lorikit.server.compile.dropout import SEED, add_dropout, dropout_mask, write_dropout
from lorikit.server.compile.gradients import add_gradients
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.errors import UnsupportedModelError

F32 = np.dtype(np.float32)
A = "layer.0.query.lora_A.weight"


def branch() -> Graph:
    """y = z A^T with z = x w, so that a gradient has to pass the dropout to reach w."""
    graph = Graph()
    ports = {"x": ("batch", "length", 8), "w": (8,), A: ("rank_0", 8)}
    for name, shape in ports.items():
        graph.inputs.append(Port(name, F32, shape))
        graph.shapes[name] = shape
    z = graph.emit("Mul", "x", "w", shape=("batch", "length", 8))
    attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
    graph.nodes.append(Node("FusedMatMul", (z, A), ("y",), attributes, MICROSOFT))
    graph.shapes["y"] = ("batch", "length", "rank_0")
    graph.outputs.append(Port("y", F32, graph.shapes["y"]))
    return graph


def feeds(batch: int, length: int, seed: int = 7) -> dict[str, np.ndarray]:
    """An identity for A, so that y is what dropout lets through."""
    x = np.random.default_rng(5).normal(size=(batch, length, 8)).astype(np.float32)
    return {
        "x": x,
        "w": np.ones(8, np.float32),
        A: np.eye(8, dtype=np.float32),
        SEED: np.asarray(seed, np.int64),
    }


def run(graph: Graph, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString())
    wanted = {port.name for port in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, {k: v for k, v in values.items() if k in wanted})
    return dict(zip(names, results, strict=True))


def with_dropout(probability: float) -> Graph:
    graph = branch()
    assert add_dropout(graph, probability) == 1
    assert write_dropout(graph) == 1
    return graph


def test_kept_values_are_scaled_so_that_the_mean_stays() -> None:
    graph = with_dropout(0.25)
    values = feeds(40, 50)
    values["x"] = np.ones_like(values["x"])

    y = run(graph, values)["y"]

    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75)}
    # 16,000 draws: the mean's standard deviation is sqrt(0.25 / 0.75 / 16000) = 0.0046.
    assert y.mean() == pytest.approx(1.0, abs=0.02)
    assert y.mean(axis=(0, 1)) == pytest.approx(np.ones(8), abs=0.06)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**61 + 12345])
def test_the_graph_drops_what_numpy_says(seed: int) -> None:
    values = feeds(3, 5, seed)

    y = run(with_dropout(0.5), values)["y"]

    mask = dropout_mask(seed, A, (3, 5, 8), 0.5)
    np.testing.assert_array_equal(y, np.where(mask, 2 * values["x"], 0))


def test_masks_differ_between_seeds_modules_and_rows() -> None:
    shape = (4, 64, 256)
    one = dropout_mask(1, A, shape, 0.5)
    others = [
        dropout_mask(2, A, shape, 0.5),
        dropout_mask(2**31 + 1, A, shape, 0.5),
        dropout_mask(1, A.replace("query", "value"), shape, 0.5),
        np.roll(one, 1, axis=1),
    ]

    # Independent masks agree in half of the values: 65,536 of them, so 0.5 +- 0.002.
    for other in others:
        assert (one == other).mean() == pytest.approx(0.5, abs=0.02)
    # No row's mask is another row's: the largest overlap of 256 values stays far below 256.
    rows = one.reshape(-1, 256).astype(np.float32) * 2 - 1
    overlap = rows @ rows.T - 256 * np.eye(len(rows))
    assert np.abs(overlap).max() < 128


def test_a_mask_does_not_depend_on_how_many_rows_there_are() -> None:
    long = dropout_mask(3, A, (1, 9, 8), 0.5)

    np.testing.assert_array_equal(long[:, :4], dropout_mask(3, A, (1, 4, 8), 0.5))


def test_the_gradient_passes_where_the_value_passed() -> None:
    graph = branch()
    add_dropout(graph, 0.5)
    graph.inputs.append(Port("dy", F32, graph.shape("y")))
    graph.shapes["dy"] = graph.shape("y")
    add_gradients(graph, {"y": "dy"}, ["w", A])
    merge_equal(graph)
    remove_dead(graph)
    write_dropout(graph)
    rng = np.random.default_rng(1)
    values = feeds(2, 3)
    values |= {
        "w": rng.normal(size=8),
        A: rng.normal(size=(4, 8)),
        "dy": rng.normal(size=(2, 3, 4)),
    }
    values |= {name: values[name].astype(np.float32) for name in ("w", A, "dy")}
    direction = {"w": rng.normal(size=8), A: rng.normal(size=(4, 8))}

    results = run(graph, values)

    slope = sum(float((results[f"{n}.grad"] * d).sum()) for n, d in direction.items())
    moved = []
    for sign in (1, -1):
        shifted = {n: np.float32(values[n] + sign * 1e-2 * d) for n, d in direction.items()}
        moved.append(float((run(graph, {**values, **shifted})["y"] * values["dy"]).sum()))
    # y is of second degree in (w, A) with a fixed mask, so a central difference is exact.
    assert slope == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=1e-3, abs=1e-3)


def test_the_backward_pass_makes_the_mask_again() -> None:
    graph = branch()
    add_dropout(graph, 0.5)
    graph.shapes["dy"] = graph.shape("y")
    graph.inputs.append(Port("dy", F32, graph.shape("y")))
    add_gradients(graph, {"y": "dy"}, ["w", A])
    merge_equal(graph)

    assert write_dropout(graph) == 2
    assert len([node for node in graph.nodes if node.op == "GreaterOrEqual"]) == 2


def test_no_dropout_changes_nothing() -> None:
    graph = branch()

    assert add_dropout(graph, 0.0) == 0
    assert [port.name for port in graph.inputs] == ["x", "w", A]


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_a_probability_out_of_range_is_refused(probability: float) -> None:
    with pytest.raises(UnsupportedModelError, match="at least 0 and below 1"):
        add_dropout(branch(), probability)


def test_a_factor_that_is_no_linear_map_is_refused() -> None:
    graph = branch()
    graph.nodes[-1].op = "Conv"

    with pytest.raises(UnsupportedModelError, match=r"input of Conv.*set the dropout to 0"):
        add_dropout(graph, 0.1)


@pytest.mark.skipif(
    "LORIKIT_OLDEST_PYTHON" not in os.environ,
    reason="LORIKIT_OLDEST_PYTHON names no interpreter with the oldest onnxruntime",
)
def test_the_oldest_runtime_drops_the_same_values(tmp_path: Path) -> None:
    graph = with_dropout(0.3)
    values = feeds(3, 5, 2**32 - 5)
    (tmp_path / "graph.onnx").write_bytes(to_onnx(graph).SerializeToString())
    np.savez(tmp_path / "in.npz", **values)

    subprocess.run(
        [
            os.environ["LORIKIT_OLDEST_PYTHON"],
            run_graph.__file__,
            *(str(tmp_path / name) for name in ("graph.onnx", "in.npz", "out.npz")),
        ],
        check=True,
        env={},
    )

    with np.load(tmp_path / "out.npz") as old:
        np.testing.assert_array_equal(old["y"], run(graph, values)["y"])
