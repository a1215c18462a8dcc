# SPDX-License-Identifier: Apache-2.0
"""Products with frozen weights: every stored format, forward and backward, piece by piece.

All sessions are open in one process and take turns, so that a ratio compares neighbours in time.
Besides the time that passed, the processor time of all threads is noted: it says as much where
other processes want the cores. ``nf4 by pairs`` and ``nf4 by fours`` are de-quantised with tables
of two and of four values, as alternatives to the compiler's choice.

    python benchmarks/products.py [--tokens 128] [--repeats 25] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from lorikit.quantization import codec
from lorikit.quantization.nf4 import LEVELS
from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.cleaning import remove_dead
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.weights import read_weights, store_base
from lorikit.server.store.blobs import FolderBlobs

SHAPES = ((384, 384), (1536, 384), (384, 1536), (5632, 2048), (2048, 5632))
"""[out, in] of MiniLM's and TinyLlama's matrices."""

STORED = (("fp32", "lean"), ("fp16", "lean"), ("int8", "lean"), ("int4", "lean"), ("nf4", "lean"))
FAST = ("int4", "fast")
TABLES = {"nf4 by pairs": 1, "nf4 by fours": 2}
"""Bytes that one look-up in a table of NF4 values takes."""

THREADS = 2
Case = tuple[str, str]


def product(rows: int, columns: int, direction: str) -> Graph:
    """Graph y = x W^T (forward) or dx = dy W (backward) with a constant W [rows, columns]."""
    source, result = ("x", columns), ("y", rows)
    if direction == "backward":
        source, result = ("dy", rows), ("dx", columns)
    float32 = np.dtype(np.float32)
    graph = Graph()
    for (name, width), ports in ((source, graph.inputs), (result, graph.outputs)):
        ports.append(Port(name, float32, ("batch", "length", width)))
        graph.shapes[name] = ("batch", "length", width)
    weight = np.random.default_rng(0).normal(0, 0.02, (rows, columns))
    graph.constants["w"] = weight.astype(np.float32)
    if direction == "backward":
        graph.nodes.append(Node("MatMul", ("dy", "w"), ("dx",)))
    else:
        attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
        graph.nodes.append(Node("FusedMatMul", ("x", "w"), ("y",), attributes, MICROSOFT))
    return graph


def by_table(graph: Graph, width: int) -> None:
    """Let the product read NF4 values from a table that is indexed by ``width`` bytes at a time."""
    values = graph.constants.pop("w").astype(np.float32)
    encoded = codec("nf4").encode(values)
    byte = np.arange(256)
    levels = np.asarray(LEVELS, np.float32)
    table = np.stack([levels[byte >> 4], levels[byte & 15]], axis=1)
    if width == 2:
        word = np.arange(65536)
        table = np.concatenate([table[word & 255], table[word >> 8]], axis=1)
    graph.constants["table"] = table
    graph.constants["codes"] = encoded.parts["codes"].view(np.uint8 if width == 1 else np.uint16)
    graph.constants["absmax"] = encoded.parts["absmax"].reshape(-1, 1)
    (node,), graph.nodes = graph.nodes, []
    index = graph.emit("Cast", "codes", to=6)
    found = graph.emit("Gather", "table", index, axis=0)
    blocks = graph.emit("Reshape", found, graph.ints(-1, 64))
    scaled = graph.emit("Mul", blocks, "absmax")
    weight = graph.emit("Reshape", scaled, graph.ints(*values.shape))
    node.inputs = (node.inputs[0], weight)
    graph.nodes.append(node)


def session(graph: Graph, case: Case, blobs: FolderBlobs) -> Any:  # no types
    """A session for a product whose weight is stored as the case says."""
    precision, kernels = case
    is_prepacked = False
    if precision in TABLES:
        by_table(graph, TABLES[precision])
    else:
        nowhere = Architecture(class_name="product", layers="layer", head="head", targets=())
        base = store_base(dict(graph.constants), set(), nowhere, precision, blobs.put)
        is_prepacked = read_weights(graph, base, "onnx", kernels).is_prepacked
    remove_dead(graph)
    path = blobs.path(blobs.put(to_onnx(graph).SerializeToString(deterministic=True)).digest)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "0" if is_prepacked else "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(
    shape: tuple[int, int], direction: str, tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """One row per case: medians in milliseconds."""
    cases = [*STORED, FAST] if direction == "forward" else [*STORED, *((t, "") for t in TABLES)]
    width = shape[1] if direction == "forward" else shape[0]
    given = np.random.default_rng(1).normal(size=(1, tokens, width)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        blobs = FolderBlobs(Path(folder))
        opened = {case: session(product(*shape, direction), case, blobs) for case in cases}
        times: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(repeats + 1):
            for case, runner in opened.items():
                times[case].append(timed(runner, given))
    for case, pairs in times.items():
        passed, used = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        yield {
            "shape": list(shape),
            "direction": direction,
            "format": " ".join(filter(None, case)).removesuffix(" lean"),
            "milliseconds": round(passed, 3),
            "processor_milliseconds": round(used, 3),
        }


def timed(runner: Any, given: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Milliseconds passed, and used by all threads, for one run."""
    name = runner.get_inputs()[0].name
    passed, used = time.perf_counter(), time.process_time()
    runner.run(None, {name: given})
    return 1e3 * (time.perf_counter() - passed), 1e3 * (time.process_time() - used)


def main() -> None:
    """Measure all products and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("docs/results/products.json"))
    given = parser.parse_args()
    rows = []
    for shape in SHAPES:
        for direction in ("forward", "backward"):
            for row in measure(shape, direction, given.tokens, given.repeats):
                rows.append(row)
                print(*row.values())
    facts = {
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "threads": THREADS,
        "tokens": given.tokens,
        "repeats": given.repeats,
    }
    given.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
