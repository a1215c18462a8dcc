# SPDX-License-Identifier: Apache-2.0
"""Stored weights read by a graph, against numpy on the decoded values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile import base as base_module
from lorikit.server.compile import kernels as kernels_module
from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.cleaning import remove_dead
from lorikit.server.compile.gradients import add_gradients
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port
from lorikit.server.compile.loss import add_vocabulary_loss
from lorikit.server.compile.memory import peak_memory
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.slices import row_slice
from lorikit.server.compile.weights import (
    Base,
    KernelReport,
    codec_for,
    frozen_weights,
    read_weights,
    store_base,
)
from lorikit.server.errors import CompileError, UnsupportedModelError
from lorikit.server.store.blobs import FolderBlobs

F32 = np.dtype(np.float32)
ARCHITECTURE = Architecture(class_name="Toy", layers="layer", head="head", targets=())


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path)


def linear_graph(
    rows: int, columns: int, *, lead: tuple[str, ...] = ("batch", "length"), bias: bool = False
) -> Graph:
    """y = x W^T (+ b) and dx = dy W with W [rows, columns]."""
    rng = np.random.default_rng(rows + columns)
    graph = Graph(
        inputs=[Port("x", F32, (*lead, columns)), Port("dy", F32, (*lead, rows))],
        outputs=[Port("y", F32, (*lead, rows)), Port("dx", F32, (*lead, columns))],
        shapes={"x": (*lead, columns), "dy": (*lead, rows), "y": (*lead, rows)},
        constants={"w": rng.normal(0, 0.1, (rows, columns)).astype(np.float32)},
    )
    graph.shapes["dx"] = (*lead, columns)
    if bias:
        graph.constants["b"] = rng.normal(size=rows).astype(np.float32)
        graph.nodes.append(Node("Gemm", ("x", "w", "b"), ("y",), {"transB": 1}))
        graph.nodes.append(Node("Gemm", ("dy", "w"), ("dx",)))
    else:
        attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
        graph.nodes.append(Node("FusedMatMul", ("x", "w"), ("y",), attributes, MICROSOFT))
        graph.nodes.append(Node("MatMul", ("dy", "w"), ("dx",)))
    return graph


def stored_base(graph: Graph, precision: str, blobs: FolderBlobs, *tables: str) -> Base:
    return store_base(dict(graph.constants), set(tables), ARCHITECTURE, precision, blobs.put)


def run(
    graph: Graph, blobs: FolderBlobs, feeds: Mapping[str, np.ndarray], *, prepack: bool = False
) -> dict[str, np.ndarray]:
    """Run a graph as a device does: from its blob, with weights mapped from theirs."""
    remove_dead(graph)
    path = blobs.path(blobs.put(to_onnx(graph).SerializeToString(deterministic=True)).digest)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def pieces_of(report: KernelReport) -> list[int]:
    return [use.pieces for use in report.uses if use.tensor == "w"]


SHAPES = {
    "whole": (96, 128),
    "exact pieces": (128, 128),
    "last piece shorter": (150, 128),
    "one row over": (97, 192),
    "columns that fill no block": (100, 72),
    "a single row": (1, 64),
}


@pytest.mark.parametrize("kernels", ["lean", "fast"])
@pytest.mark.parametrize("runtime", ["onnx", "onnx-training"])
@pytest.mark.parametrize("precision", ["int4", "nf4", "int8", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_products_equal_numpy(
    shape: str,
    precision: str,
    runtime: str,
    kernels: str,
    blobs: FolderBlobs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels_module, "PIECE_BYTES", 4 * 96 * 128)
    rows, columns = SHAPES[shape]
    graph = linear_graph(rows, columns)
    base = stored_base(graph, precision, blobs)
    weight = base.decoded("w")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, columns)).astype(np.float32)
    dy = rng.normal(size=(2, 3, rows)).astype(np.float32)

    report = read_weights(graph, base, runtime, kernels)
    found = run(graph, blobs, {"x": x, "dy": dy}, prepack=report.is_prepacked)

    # Products of at most 192 numbers of order 0.1: float32 sums are good to 1e-6.
    np.testing.assert_allclose(found["y"], x @ weight.T, atol=2e-6)
    np.testing.assert_allclose(found["dx"], dy @ weight, atol=2e-6)


@pytest.mark.parametrize("kernels", ["lean", "fast"])
@pytest.mark.parametrize("runtime", ["onnx", "onnx-training"])
def test_products_with_blocks_of_128_equal_numpy(
    runtime: str, kernels: str, blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "WIDE_ROW", 128)
    monkeypatch.setattr(kernels_module, "PIECE_BYTES", 4 * 32 * 128)
    graph = linear_graph(150, 128)
    base = stored_base(graph, "int4", blobs)
    weight = base.decoded("w")
    rng = np.random.default_rng(9)
    x = rng.normal(size=(2, 3, 128)).astype(np.float32)
    dy = rng.normal(size=(2, 3, 150)).astype(np.float32)

    report = read_weights(graph, base, runtime, kernels)
    found = run(graph, blobs, {"x": x, "dy": dy}, prepack=report.is_prepacked)

    assert dict(report.tensors_by_codec) == {"int4-row128": 1}
    np.testing.assert_allclose(found["y"], x @ weight.T, atol=2e-6)
    np.testing.assert_allclose(found["dx"], dy @ weight, atol=2e-6)


@pytest.mark.parametrize("precision", ["int4", "nf4", "int8", "fp16", "fp32"])
def test_a_bias_is_added_to_the_joined_pieces(
    precision: str, blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_module, "PIECE_BYTES", 4 * 32 * 128)
    for kernels in ("lean", "fast"):
        graph = linear_graph(150, 128, lead=("batch",), bias=True)
        base = stored_base(graph, precision, blobs)
        weight, bias = base.decoded("w"), base.decoded("b")
        rng = np.random.default_rng(2)
        x = rng.normal(size=(3, 128)).astype(np.float32)
        dy = rng.normal(size=(3, 150)).astype(np.float32)

        report = read_weights(graph, base, "onnx", kernels)
        found = run(graph, blobs, {"x": x, "dy": dy}, prepack=report.is_prepacked)

        np.testing.assert_allclose(found["y"], x @ weight.T + bias, atol=2e-6)
        np.testing.assert_allclose(found["dx"], dy @ weight, atol=2e-6)


def test_a_large_matrix_is_never_whole_in_memory(blobs: FolderBlobs) -> None:
    rows, columns = 2048, 5632
    graph = linear_graph(rows, columns)
    graph.constants["w"] = np.ones((rows, columns), np.float32)
    base = stored_base(graph, "int4", blobs)

    report = read_weights(graph, base, "onnx")
    remove_dead(graph)
    peak = peak_memory(graph, {"batch": 1, "length": 1}).live_bytes

    assert pieces_of(report) == [6, 6]
    # A piece of at most 352 rows, and rows of activations, instead of 46 MB.
    assert peak < 4 * 352 * columns + 16 * (rows + columns)


def test_pieces_are_parts_of_one_blob_without_gaps(
    blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_module, "PIECE_BYTES", 4 * 32 * 128)
    graph = linear_graph(150, 128)
    base = stored_base(graph, "int4", blobs)

    read_weights(graph, base, "onnx")
    remove_dead(graph)

    for role, place in base.stored["w"].places.items():
        ranges = sorted(
            (part.offset, part.length)
            for name, part in graph.external.items()
            if f"/{role}/" in name
        )
        assert [offset for offset, _ in ranges] == [
            place.offset + sum(length for _, length in ranges[:i]) for i in range(len(ranges))
        ]
        assert sum(length for _, length in ranges) == place.length
        assert {part.blob for part in graph.external.values()} == {base.stored["w"].blob}


def test_forward_and_backward_map_the_same_bytes_once(
    blobs: FolderBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_module, "PIECE_BYTES", 4 * 32 * 128)
    for precision in ("int4", "nf4", "int8"):
        graph = linear_graph(150, 128)
        base = stored_base(graph, precision, blobs)

        read_weights(graph, base, "onnx")
        remove_dead(graph)

        mapped = sum(place.length for place in graph.external.values())
        assert mapped == base.stored["w"].encoded.nbytes


def test_the_report_names_kernel_codec_and_pieces(blobs: FolderBlobs) -> None:
    graph = linear_graph(64, 128)
    base = stored_base(graph, "int4", blobs)

    lean = read_weights(graph.copy(), base, "onnx")
    fast = read_weights(graph.copy(), base, "onnx", "fast")

    assert dict(lean.uses_by_kernel) == {"int4-row64 GatherBlockQuantized": 2}
    assert dict(fast.uses_by_kernel) == {
        "int4-row64 MatMulNBits": 1,
        "int4-row64 GatherBlockQuantized": 1,
    }
    assert dict(lean.tensors_by_codec) == {"int4-row64": 1}
    assert lean.tensors == {"w"}
    assert (lean.is_prepacked, fast.is_prepacked) == (False, True)


def test_unknown_kernels_are_refused(blobs: FolderBlobs) -> None:
    graph = linear_graph(64, 128)

    with pytest.raises(CompileError, match="lean, fast, got 'slow'"):
        read_weights(graph, stored_base(graph, "int4", blobs), "onnx", "slow")


def table_graph(rows: int, columns: int) -> Graph:
    """Rows of a table that is also the head: ids -> embedding -> logits."""
    rng = np.random.default_rng(5)
    graph = Graph(
        inputs=[Port("ids", np.dtype(np.int64), ("batch", "length"))],
        constants={"table": rng.normal(size=(rows, columns)).astype(np.float32)},
    )
    graph.nodes.append(Node("Gather", ("table", "ids"), ("rows",), {"axis": 0}))
    graph.shapes["rows"] = ("batch", "length", columns)
    attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
    graph.nodes.append(Node("FusedMatMul", ("rows", "table"), ("logits",), attributes, MICROSOFT))
    graph.shapes["logits"] = ("batch", "length", rows)
    graph.outputs = [Port(n, F32, graph.shapes[n]) for n in ("rows", "logits")]
    return graph


@pytest.mark.parametrize("precision", ["int4", "nf4", "int8", "fp16", "fp32"])
def test_a_tied_table_is_stored_once_and_read_by_rows_and_as_head(
    precision: str, blobs: FolderBlobs
) -> None:
    graph = table_graph(50, 64)
    weights, tables = frozen_weights(graph, {"table"})
    base = store_base(weights, tables, ARCHITECTURE, precision, blobs.put)
    table = base.decoded("table")
    ids = np.array([[0, 49, 7], [3, 3, 1]])

    read_weights(graph, base, "onnx")
    found = run(graph, blobs, {"ids": ids})

    assert tables == {"table"}
    assert base.stored["table"].encoded.codec == {"int4": "int8", "nf4": "int8"}.get(
        precision, precision
    )
    np.testing.assert_allclose(found["rows"], table[ids], rtol=1e-6)
    np.testing.assert_allclose(found["logits"], table[ids] @ table.T, rtol=1e-5, atol=1e-5)


def test_rows_of_a_table_in_int4_are_read_one_by_one(blobs: FolderBlobs) -> None:
    graph = table_graph(50, 128)
    base = stored_base(graph, "int4", blobs)
    ids = np.array([[0, 49, 7]])

    read_weights(graph, base, "onnx")
    found = run(graph, blobs, {"ids": ids})

    np.testing.assert_array_equal(found["rows"], base.decoded("table")[ids])


def test_rows_of_a_table_whose_blocks_cross_rows_are_refused(blobs: FolderBlobs) -> None:
    graph = table_graph(64, 64)

    with pytest.raises(UnsupportedModelError, match="table in nf4 cannot be read one by one"):
        read_weights(graph, stored_base(graph, "nf4", blobs), "onnx")


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_that_gives_the_logits_is_a_table(bias: bool) -> None:
    graph = linear_graph(30, 64)
    graph.nodes[0].outputs = ("product",)
    graph.constants["b"] = np.zeros(30, np.float32)
    graph.nodes.insert(1, Node("Add", ("product", "b"), ("logits",)))
    if not bias:
        graph.nodes[1] = Node("Identity", ("product",), ("logits",))

    assert frozen_weights(graph, {"w", "b"})[1] == {"w"}
    assert frozen_weights(graph, {"w", "b"}, logits="none")[1] == set()


@pytest.mark.parametrize("precision", ["int4", "nf4", "int8", "fp16", "fp32"])
def test_the_sliced_loss_of_a_stored_head(precision: str, blobs: FolderBlobs) -> None:
    rng = np.random.default_rng(6)
    graph = Graph(
        inputs=[Port("hidden", F32, ("batch", "length", 64))],
        shapes={"hidden": ("batch", "length", 64)},
        constants={
            "head": rng.normal(size=(150, 64)).astype(np.float32),
            "offset": rng.normal(size=150).astype(np.float32),
        },
    )
    base = stored_base(graph, precision, blobs, "head")
    gradient = add_vocabulary_loss(graph, "hidden", "head", "offset", slice_bytes=4 * 64 * 40)
    graph.outputs.append(Port(gradient, F32, graph.shape(gradient)))
    head, offset = base.decoded("head").astype(float), base.decoded("offset")
    hidden = rng.normal(size=(2, 3, 64)).astype(np.float32)
    labels = rng.integers(0, 150, (2, 3))
    logits = hidden @ head.T + offset
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    weights = np.full((2, 3), 1 / 6, np.float32)

    report = read_weights(graph, base, "onnx")
    found = run(graph, blobs, {"hidden": hidden, "labels": labels, "weights": weights})

    at_label = np.take_along_axis(shares, labels[..., None], -1)
    assert found["loss"] == pytest.approx(-np.log(at_label).mean(), rel=1e-6)
    expected = (shares - np.eye(150)[labels]) @ head / 6
    np.testing.assert_allclose(found[gradient], expected, atol=1e-6)
    assert report.tensors == {"head", "offset"}
    # Four slices of the head, each de-quantised once, and the rows of the labels.
    assert sum(use.tensor == "head" for use in report.uses) == 5


def tied_loss_graph(blobs: FolderBlobs) -> tuple[Graph, KernelReport, Base]:
    """Embedding, and the sliced loss of the same table as head; read as int8."""
    graph = table_graph(150, 64)
    base = stored_base(graph, "int8", blobs, "table")
    graph.nodes, graph.outputs = graph.nodes[:1], []
    gradient = add_vocabulary_loss(graph, "rows", "table", slice_bytes=4 * 64 * 40)
    graph.outputs.append(Port(gradient, F32, graph.shape(gradient)))
    report = read_weights(graph, base, "onnx")
    remove_dead(graph)
    return graph, report, base


def test_a_table_that_is_read_by_rows_and_as_head_is_mapped_once(blobs: FolderBlobs) -> None:
    graph, report, base = tied_loss_graph(blobs)

    mapped = sum(place.length for place in graph.external.values())
    assert mapped == base.stored["table"].encoded.nbytes
    # Rows of the tokens and of the labels, and four slices.
    assert len(report.uses) == 6


def test_a_runtime_runs_slices_in_the_order_of_the_file(blobs: FolderBlobs, tmp_path: Path) -> None:
    graph = tied_loss_graph(blobs)[0]
    path = blobs.path(blobs.put(to_onnx(graph).SerializeToString(deterministic=True)).digest)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = np.array([[0, 149, 7]])
    session.run(None, {"ids": ids, "labels": ids, "weights": np.full((1, 3), 1 / 3, np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())

    names = [event["name"] for event in events if event["name"].endswith("_kernel_time")]
    ran = [name.removesuffix("_kernel_time") for name in names]
    # Lengths run as soon as they can be read, wherever they stand.
    lengths = {node.outputs[0] for node in graph.nodes if node.op == "Shape"}
    expected = [node.outputs[0] for node in graph.nodes if node.op != "Shape"]
    assert [name for name in ran if name not in lengths] == expected


def test_rows_that_cut_a_block_are_refused(blobs: FolderBlobs) -> None:
    graph = linear_graph(64, 96)
    part = row_slice(graph, "w", 1, 64)
    graph.nodes[0].inputs = ("x", part)
    base = store_base({"w": graph.constants["w"]}, set(), ARCHITECTURE, "nf4", blobs.put)

    with pytest.raises(CompileError, match="rows 1 to 64 of 64 cut through a block of nf4"):
        read_weights(graph, base, "onnx")


def test_a_kernel_of_a_convolution_is_stored_in_half(blobs: FolderBlobs) -> None:
    graph = Graph(
        inputs=[Port("x", F32, ("batch", 3, 8, 8))],
        outputs=[Port("y", F32, ("batch", 5, 2, 2))],
        shapes={"y": ("batch", 5, 2, 2)},
        constants={"k": np.random.default_rng(7).normal(size=(5, 3, 4, 4)).astype(np.float32)},
    )
    graph.nodes.append(Node("Conv", ("x", "k"), ("y",), {"strides": (4, 4)}))
    base = stored_base(graph, "int4", blobs)
    x = np.random.default_rng(8).normal(size=(1, 3, 8, 8)).astype(np.float32)

    read_weights(graph, base, "onnx")
    found = run(graph, blobs, {"x": x})

    patches = x.reshape(1, 3, 2, 4, 2, 4).transpose(0, 2, 4, 1, 3, 5).reshape(1, 2, 2, -1)
    expected = patches @ base.decoded("k").reshape(5, -1).T
    np.testing.assert_allclose(found["y"], expected.transpose(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "precision", "is_table", "expected"),
    [
        ((64,), "int4", False, "fp32"),
        ((8, 64), "int4", False, "int4-row64"),
        ((8, 72), "int4", False, "int8"),
        ((8, 2048), "int4", False, "int4-row128"),
        ((8, 2112), "int4", False, "int4-row64"),
        ((8, 2056), "int4", False, "int8"),
        ((8, 64), "int4", True, "int8"),
        ((8, 64), "nf4", False, "nf4"),
        ((3, 5), "nf4", False, "int8"),
        ((8, 64), "nf4", True, "int8"),
        ((8, 64), "fp16", True, "fp16"),
        ((4, 3, 2, 2), "int8", False, "fp16"),
        ((8, 64), "fp32", False, "fp32"),
    ],
)
def test_codec_of_a_tensor(
    shape: tuple[int, ...], precision: str, is_table: bool, expected: str
) -> None:
    values = np.ones(shape, np.float32)

    assert codec_for("w", values, precision, is_table=is_table) == expected


def test_gradients_through_a_stored_chain_equal_numpy(blobs: FolderBlobs) -> None:
    graph = linear_graph(128, 64)
    graph.nodes, graph.outputs = graph.nodes[:1], []
    graph.constants["v"] = np.random.default_rng(9).normal(size=(64, 128)).astype(np.float32)
    attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
    graph.nodes.append(Node("FusedMatMul", ("y", "v"), ("z",), attributes, MICROSOFT))
    graph.shapes["z"] = ("batch", "length", 64)
    graph.inputs[1] = Port("dz", F32, ("batch", "length", 64))
    graph.shapes["dz"] = ("batch", "length", 64)
    base = stored_base(graph, "int4", blobs)
    add_gradients(graph, {"z": "dz"}, ["x"])
    rng = np.random.default_rng(10)
    x, dz = (rng.normal(size=(2, 3, 64)).astype(np.float32) for _ in range(2))

    read_weights(graph, base, "onnx")
    found = run(graph, blobs, {"x": x, "dz": dz})

    expected = dz @ base.decoded("v") @ base.decoded("w")
    np.testing.assert_allclose(found["x.grad"], expected, atol=1e-4)
