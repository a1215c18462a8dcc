# SPDX-License-Identifier: Apache-2.0
"""What ``minimum_runtime`` says, against the releases of onnxruntime that are at hand.

The installed release is always tried. ``LORIKIT_RUNTIMES`` may name folders with others, each made
with ``pip install --no-deps --target FOLDER onnxruntime==RELEASE``, separated as in ``PATH``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile import run_graph as run_graph_script
from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.cleaning import remove_dead
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port
from lorikit.server.compile.loss import add_loss
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.runtimes import CONTRIB_SINCE
from lorikit.server.compile.weights import minimum_runtime, read_weights, store_base
from lorikit.server.errors import CompileError
from lorikit.server.store.blobs import FolderBlobs

F32 = np.dtype(np.float32)
RUNTIMES = ["", *filter(None, os.environ.get("LORIKIT_RUNTIMES", "").split(os.pathsep))]


def linear(blobs: FolderBlobs, precision: str, kernels: str = "lean") -> Graph:
    """Loss of x W^T W W^T with W stored in a precision; reads it in both directions."""
    graph = Graph(
        inputs=[Port("x", F32, ("batch", 64))],
        shapes={"x": ("batch", 64)},
        constants={"w": np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)},
    )
    transposed = {"transA": 0, "transB": 1, "alpha": 1.0}
    for source, result, width in (("x", "y", 40), ("z", "logits", 40)):
        graph.nodes.append(Node("FusedMatMul", (source, "w"), (result,), transposed, MICROSOFT))
        graph.shapes[result] = ("batch", width)
    graph.nodes.insert(1, Node("MatMul", ("y", "w"), ("z",)))
    graph.shapes["z"] = ("batch", 64)
    add_loss(graph)
    architecture = Architecture(class_name="Toy", layers="layer", head="head", targets=())
    base = store_base({"w": graph.constants["w"]}, set(), architecture, precision, blobs.put)
    read_weights(graph, base, "onnx", kernels)
    remove_dead(graph)
    return graph


def fused() -> Graph:
    """QuickGelu of rotated heads."""
    graph = Graph(
        inputs=[Port("x", F32, ("batch", 2, 3, 8))],
        outputs=[Port("y", F32, ("batch", 2, 3, 8))],
        constants={
            "positions": np.zeros(1, np.int64),
            "cosine": np.ones((3, 4), np.float32),
            "sine": np.zeros((3, 4), np.float32),
        },
    )
    inputs = ("x", "positions", "cosine", "sine")
    graph.nodes.append(Node("RotaryEmbedding", inputs, ("r",), {}, MICROSOFT))
    graph.nodes.append(Node("QuickGelu", ("r",), ("y",), {"alpha": 1.702}, MICROSOFT))
    return graph


@pytest.mark.parametrize(
    ("precision", "kernels", "expected"),
    [
        ("fp32", "lean", "1.20"),
        ("fp16", "lean", "1.20"),
        ("int8", "lean", "1.20"),
        ("nf4", "lean", "1.20"),
        ("int4", "lean", "1.22"),
        ("int4", "fast", "1.22"),
    ],
)
def test_the_oldest_release_follows_from_the_operators(
    precision: str, kernels: str, expected: str, tmp_path: Path
) -> None:
    assert minimum_runtime(linear(FolderBlobs(tmp_path), precision, kernels)) == expected


def test_a_graph_that_only_multiplies_with_codes_runs_on_older_releases(tmp_path: Path) -> None:
    graph = linear(FolderBlobs(tmp_path), "int4", "fast")
    graph.nodes = [node for node in graph.nodes if node.op != "GatherBlockQuantized"]

    assert minimum_runtime(graph) == "1.20"


def test_a_contrib_operator_of_unknown_age_is_named() -> None:
    graph = Graph(nodes=[Node("Nonsuch", ("x",), ("y",), {}, MICROSOFT)])

    with pytest.raises(CompileError, match="Nonsuch"):
        minimum_runtime(graph)


@pytest.mark.parametrize("folder", RUNTIMES, ids=lambda folder: Path(folder).name or "installed")
@pytest.mark.parametrize("case", ["int4", "int4 fast", "nf4", "int8", "fp16", "fp32", "fused"])
def test_a_release_runs_a_graph_if_it_is_not_older(case: str, folder: str, tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    graph = fused() if case == "fused" else linear(blobs, *case.split())
    path = blobs.path(blobs.put(to_onnx(graph).SerializeToString()).digest)
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "outputs.npz"
    np.savez(
        inputs,
        x=np.ones([2 if n == "batch" else int(n) for n in graph.inputs[0].shape], np.float32),
        labels=np.array([1, 3]),
        weights=np.array([0.5, 0.5], np.float32),
    )
    python = [sys.executable, run_graph_script.__file__, str(path), str(inputs), str(outputs)]
    environment = {**os.environ, "PYTHONPATH": folder} if folder else dict(os.environ)

    done = subprocess.run(python, env=environment, capture_output=True, check=False)

    is_old = numbers(release(folder)) < numbers(minimum_runtime(graph))
    assert (done.returncode != 0) == is_old


def test_the_table_has_no_release_that_is_not_tried() -> None:
    assert numbers(onnxruntime.__version__) >= max(
        numbers(since) for since in CONTRIB_SINCE.values()
    )


def release(folder: str) -> str:
    """Release of the onnxruntime in a folder; of the installed one for an empty name."""
    if not folder:
        return str(onnxruntime.__version__)
    (found,) = Path(folder).glob("onnxruntime-*.dist-info")
    return found.name.removeprefix("onnxruntime-").removesuffix(".dist-info")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
