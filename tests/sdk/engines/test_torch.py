# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` engine: where its values live, what it loads, and CUDA where there is a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import HEAD, INPUTS, A, B, TinyPackage, build_tiny_package
from tests.sdk.test_plan import Device

torch = pytest.importorskip("torch", reason="these tests run the torch engine")

from lorikit.proto.plan import OptimizerConfig, Phase, Plan  # noqa: E402
from lorikit.quantization.nf4 import NF4  # noqa: E402
from lorikit.sdk._errors import PackageError  # noqa: E402
from lorikit.sdk.engines import open_engine  # noqa: E402
from lorikit.sdk.engines import torch as engines_torch  # noqa: E402
from lorikit.sdk.engines._torch.base import Nibbles  # noqa: E402
from lorikit.sdk.engines._torch.program import _together, load_program  # noqa: E402

CPU = torch.device("cpu")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def package(tmp_path: Path) -> TinyPackage:
    return build_tiny_package(tmp_path)


def _graph(package: TinyPackage) -> Path:
    return package.folder / package.manifest.graphs[0].blob.digest


def _blobs(package: TinyPackage) -> dict[str, int]:
    return {blob.digest: blob.size for blob in package.manifest.weight_blobs}


def test_weights_are_views_of_the_mapped_blob(package: TinyPackage) -> None:
    program = load_program(_graph(package), _blobs(package), CPU)
    np.testing.assert_array_equal(program.constants["embedding"].numpy(), package.embedding)
    blob = package.manifest.weight_blobs[0].digest
    places = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(blob) and line.split()[1].startswith("r--")
    ] if sys.platform == "linux" else []  # fmt: skip
    address = program.constants["embedding"].data_ptr()
    assert not places or any(int(a, 16) <= address < int(b, 16) for a, b in places)
    assert places or sys.platform != "linux"


def test_equal_runs_give_equal_bits(package: TinyPackage) -> None:
    adapter, batch = package.adapter(), package.batch((5, 3, 9))
    results = [
        open_engine("torch", package.manifest, package.folder, threads=1).gradients(
            adapter, batch, INPUTS
        )
        for _ in range(2)
    ]
    assert results[0].loss == results[1].loss
    for name, gradient in results[0].gradients.items():
        np.testing.assert_array_equal(results[1].gradients[name], gradient)


def test_prediction_and_loss_are_those_of_the_package(tmp_path: Path) -> None:
    package = build_tiny_package(tmp_path, graphs=("train", "predict", "evaluate"))
    adapter, batch = package.adapter(), package.batch()
    engine = open_engine("torch", package.manifest, package.folder, threads=1)
    features = engine.predict(adapter, batch, INPUTS).features
    np.testing.assert_allclose(features, package.features(adapter, batch), rtol=1e-4, atol=1e-5)
    expected = package.reference(adapter, batch)
    evaluation = engine.loss(adapter, batch, INPUTS)
    assert evaluation.loss == pytest.approx(expected.loss, rel=1e-5)
    assert evaluation.correct == expected.correct


_LOADED = """
import sys
from pathlib import Path
from tests.sdk.engines.tiny_package import build_tiny_package, INPUTS
from lorikit.sdk.engines import open_engine
package = build_tiny_package(Path(sys.argv[1]))
for name in [name for name in sys.modules if name.split(".")[0] == "onnx"]:
    del sys.modules[name]
engine = open_engine("torch", package.manifest, package.folder, threads=1)
engine.gradients(package.adapter(), package.batch(), INPUTS)
print([m for m in ("onnx", "onnxruntime", "transformers", "peft") if m in sys.modules])
"""


def test_engine_needs_neither_onnx_nor_transformers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_dropout_drops_what_numpy_says(tmp_path: Path, seed: int) -> None:
    dropout = pytest.importorskip("lorikit.server.compile.dropout", reason="needs lorikit[server]")
    from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port
    from lorikit.server.compile.onnx_format import to_onnx

    weight, shape, kind = "query.lora_A.weight", (3, 5, 8), np.dtype(np.float32)
    graph = Graph(
        inputs=[Port("x", kind, ("batch", "length", 8)), Port(weight, kind, ("rank", 8))],
        outputs=[Port("y", kind, ("batch", "length", "rank"))],
        shapes={"x": ("batch", "length", 8), weight: ("rank", 8), "y": ("batch", "length", "rank")},
    )
    attributes = {"transA": 0, "transB": 1, "alpha": 1.0}
    graph.nodes.append(Node("FusedMatMul", ("x", weight), ("y",), attributes, MICROSOFT))
    dropout.add_dropout(graph, 0.5)
    dropout.write_dropout(graph)
    (tmp_path / "graph").write_bytes(to_onnx(graph).SerializeToString())
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    feeds = {"x": x, weight: np.eye(8, dtype=np.float32), "dropout_seed": np.asarray(seed)}

    (y,) = load_program(tmp_path / "graph", {}, CPU).run(["y"], feeds)

    kept = dropout.dropout_mask(seed, weight, shape, 0.5)
    np.testing.assert_array_equal(y, np.where(kept, 2 * x, 0))


def test_shapes_stay_on_the_host_and_data_goes_to_the_device() -> None:
    """A device without memory stands in for a GPU: what matters is which tensors are moved."""
    device = torch.device("meta")
    data, shape = torch.zeros(2, 3, device=device), torch.tensor([3, 2])
    large, scalar = torch.zeros(100), torch.tensor(2.0)

    def moved(op: str, *inputs: torch.Tensor) -> list[str]:
        return [value.device.type for value in _together(op, inputs, device)]

    assert moved("Reshape", data, shape) == ["meta", "cpu"]
    assert moved("Concat", shape, shape) == ["cpu", "cpu"]
    assert moved("Gather", shape, torch.tensor(0)) == ["cpu", "cpu"]
    assert moved("Gather", data, shape) == ["meta", "meta"]
    assert moved("Mul", data, scalar) == ["meta", "meta"]
    assert moved("Add", large, scalar) == ["meta", "meta"]
    assert moved("Range", shape, shape, shape) == ["cpu"] * 3


def test_four_bit_constants_stay_packed() -> None:
    packed = Nibbles(torch.tensor([0x21, 0xF8], dtype=torch.uint8), (3,), signed=True)
    assert packed.unpacked().tolist() == [1, 2, -8]
    unsigned = Nibbles(packed.codes, (2, 2), signed=False)
    assert unsigned.unpacked().tolist() == [[1, 2], [8, 15]]


@pytest.mark.parametrize("name", ["adamw", "mezo"])
def test_plan_ends_with_the_adapter_of_the_onnx_engine(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime", reason="the reference is the onnx engine")
    optimizer = OptimizerConfig(name=name, learning_rate=0.01)
    phase = Phase(train=(A, B, HEAD), steps=5, batch_size=6, micro_batch=4, optimizer=optimizer)
    plan = Plan(method="fedit", inputs=INPUTS, phases=(phase,), max_length=16)
    sent = {}
    for engine in ("onnx", "torch"):
        (tmp_path / engine).mkdir()
        device = Device(tmp_path / engine)
        opened = open_engine(engine, device.package.manifest, device.folder, threads=1)
        outcome = device.executor(opened).run(plan, device.package.adapter(), "task-1")
        sent[engine] = {n: each.parts["values"] for n, each in outcome.bundle.tensors.items()}
    for tensor, expected in sent["onnx"].items():
        # Five steps of rounding differences; MeZO divides the losses' last bits by 0.002.
        np.testing.assert_allclose(sent["torch"][tensor], expected, atol=1e-5)


@pytest.mark.gpu
@needs_cuda
def test_cuda_gives_the_gradients_of_the_chain_rule(package: TinyPackage) -> None:
    engine = engines_torch.open_package(package.manifest, package.folder, threads=1, device="cuda")
    adapter, batch = package.adapter(), package.batch((5, 3, 9))
    result, expected = engine.gradients(adapter, batch, INPUTS), package.reference(adapter, batch)
    assert result.loss == pytest.approx(expected.loss, rel=1e-4)
    for name, gradient in expected.gradients.items():
        error = np.linalg.norm(result.gradients[name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-4, name


@pytest.mark.gpu
@needs_cuda
def test_cuda_holds_each_weight_once_as_it_is_stored(package: TinyPackage) -> None:
    before = torch.cuda.memory_allocated()
    program = load_program(_graph(package), _blobs(package), torch.device("cuda"))
    stored = package.embedding.nbytes + package.weight.nbytes
    # Allocations are rounded up to 512 bytes each.
    assert stored <= torch.cuda.memory_allocated() - before <= stored + 512 * 8
    assert program.constants["embedding"].is_cuda


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shape", [(6, 64), (1, 384), (384, 1)])
def test_cuda_kernel_reads_what_our_codec_wrote(shape: tuple[int, int]) -> None:
    kernels = pytest.importorskip("lorikit.sdk.engines._bitsandbytes", reason="needs bitsandbytes")
    encoded = NF4.encode(np.random.default_rng(3).standard_normal(shape).astype(np.float32))
    codes, absmax = (
        torch.tensor(np.asarray(encoded.parts[n]), device="cuda") for n in ("codes", "absmax")
    )
    values = kernels.dequantized(codes, absmax, shape, block=64, kind="nf4")
    np.testing.assert_allclose(values.cpu().numpy(), NF4.decode(encoded), rtol=1e-6)


@pytest.mark.gpu
@needs_cuda
def test_cuda_survives_a_token_outside_the_vocabulary(package: TinyPackage) -> None:
    engine = engines_torch.open_package(package.manifest, package.folder, threads=1, device="cuda")
    batch = package.batch()
    batch.inputs["input_ids"][0, 0] = 10**6
    with pytest.raises(PackageError, match="outside the"):
        engine.gradients(package.adapter(), batch, INPUTS)
    engine.gradients(package.adapter(), package.batch(), INPUTS)
