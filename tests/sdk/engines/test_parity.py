# SPDX-License-Identifier: Apache-2.0
"""All engines compute the same: the chain rule on a tiny package, torch + PEFT on a real model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.running import PLACES, Place
from tests.sdk.engines.tiny_package import build_tiny_package, tokenizer_json

from lorikit.proto.manifest import Manifest, Task
from lorikit.proto.tensors import Tensors
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines._probe import Probe, parse_probe
from lorikit.sdk.engines.base import Batch, Gradients

TOLERANCE = 1e-4
"""Relative error of each gradient, Frobenius norm; the bound of the project."""


@pytest.fixture(params=PLACES, ids=str)
def place(request: pytest.FixtureRequest) -> Place:
    chosen: Place = request.param
    if chosen.variable:
        chosen.interpreter()
    else:
        runtime = "torch" if chosen.engine == "torch" else "onnxruntime"
        pytest.importorskip(runtime, reason=f"the {chosen.engine} engine needs {runtime}")
    return chosen


def _check(result: Gradients, expected: Gradients) -> None:
    assert result.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert result.correct == expected.correct
    assert result.gradients.keys() == expected.gradients.keys()
    joint = np.sqrt(sum(np.square(g).sum() for g in expected.gradients.values()))
    for name, gradient in expected.gradients.items():
        scale = max(np.linalg.norm(gradient), 1e-3 * joint)
        assert np.linalg.norm(result.gradients[name] - gradient) / scale < TOLERANCE, name


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("lengths", [(1,), (5, 3), (2, 7, 7, 1)])
def test_tiny_package_gives_the_gradients_of_the_chain_rule(
    place: Place, tmp_path: Path, rank: int, lengths: tuple[int, ...]
) -> None:
    package = build_tiny_package(tmp_path).with_probe()
    adapter, batch = package.adapter(rank), package.batch(lengths)
    result = place.gradients(tmp_path, package.manifest, adapter, batch)
    _check(result, package.reference(adapter, batch))


LABELS = ("alarm", "bill", "car", "date", "exit")
SMALL_BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 120, "hidden_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 48, "type_vocab_size": 2, "hidden_act": "gelu",
    "initializer_range": 0.2,
}  # fmt: skip


SMALL_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 120,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 48, "initializer_range": 0.1,
}  # fmt: skip
SMALL_VIT = {
    "model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32, "patch_size": 8,
    "initializer_range": 0.1,
}  # fmt: skip


class Compiled:
    """A small model of random weights in a Hugging Face folder, and packages of it."""

    def __init__(self, folder: Path, model: dict, task: Task, targets: tuple[str, ...]) -> None:
        compile_ = pytest.importorskip("lorikit.server.compile", reason="needs lorikit[server]")
        from lorikit.server.store.blobs import FolderBlobs

        self.blobs = folder / "blobs"
        model_folder = folder / "model"
        _write_model(model_folder, model)
        self.compiler = compile_.Compiler(
            model_folder, task, targets=targets, blobs=FolderBlobs(self.blobs)
        )

    def manifest(
        self, precision: str, lowest: int, kept: tuple[int, ...], runtime: str
    ) -> Manifest:
        return self.compiler.package(
            precision=precision, lowest_trained_layer=lowest, kept_layers=kept, runtime=runtime
        ).manifest


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    task = Task(kind="sequence-classification", labels=LABELS)
    folder = tmp_path_factory.mktemp("bert")
    return Compiled(folder, SMALL_BERT, task, ("query", "value", "dense"))


@pytest.fixture(scope="module", params=["llama", "vit"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        task = Task(kind="causal-language-modeling", labels=())
        return Compiled(folder, SMALL_LLAMA, task, ("q_proj", "v_proj"))
    task = Task(kind="image-classification", labels=LABELS)
    return Compiled(folder, SMALL_VIT, task, ("q_proj", "v_proj"))


def _write_model(folder: Path, model: dict) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference model is torch's")
    torch = pytest.importorskip("torch", reason="the reference model is torch's")
    torch.manual_seed(7)
    (architecture,) = model["architectures"]
    config = transformers.AutoConfig.for_model(**model)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())


def _placed(compiled: Compiled, tmp_path: Path, **variant: object) -> tuple[Manifest, Probe]:
    """The package in a folder of its own, as on a device, and what torch + PEFT gives for it."""
    manifest = compiled.manifest(**variant)  # type: ignore[arg-type]
    for blob in manifest.blobs():
        shutil.copy(compiled.blobs / blob.digest, tmp_path / blob.digest)
    assert manifest.probe is not None
    return manifest, parse_probe((tmp_path / manifest.probe.digest).read_bytes())


@pytest.mark.parametrize(
    ("precision", "lowest", "kept"),
    [
        ("fp32", 0, (0, 1, 2)),
        ("fp16", 1, (0, 1, 2)),
        ("int8", 0, (0, 2)),
        ("nf4", 0, (0, 1, 2)),
        ("nf4", 2, (0, 2)),
        ("nf4", 3, (0, 1, 2)),
        ("int4", 1, (0, 1, 2)),
    ],
)
def test_compiled_package_gives_the_gradients_of_torch_and_peft(
    place: Place,
    compiled: Compiled,
    tmp_path: Path,
    precision: str,
    lowest: int,
    kept: tuple[int, ...],
) -> None:
    manifest, probe = _placed(
        compiled, tmp_path, precision=precision, lowest=lowest, kept=kept, runtime=place.engine
    )
    if place.variable and precision == "int4":
        pytest.skip("onnxruntime reads four-bit codes from 1.22 on")
    result = place.gradients(tmp_path, manifest, probe.adapter, probe.batch)
    _check(result, Gradients(probe.loss, result.correct, probe.gradients))


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_language_and_vision_models_give_the_gradients_of_torch_and_peft(
    place: Place, other: Compiled, tmp_path: Path, precision: str
) -> None:
    manifest, probe = _placed(
        other, tmp_path, precision=precision, lowest=0, kept=(0, 1), runtime="onnx"
    )
    result = place.gradients(tmp_path, manifest, probe.adapter, probe.batch)
    _check(result, Gradients(probe.loss, result.correct, probe.gradients))


@pytest.mark.parametrize("precision", ["nf4", "int4"])
def test_forward_graph_gives_the_loss_of_the_training_graph(
    place: Place, compiled: Compiled, tmp_path: Path, precision: str
) -> None:
    if place.variable:
        pytest.skip("runs in this interpreter alone")
    manifest, probe = _placed(
        compiled, tmp_path, precision=precision, lowest=0, kept=(0, 1, 2), runtime=place.engine
    )
    engine = open_engine(place.engine, manifest, tmp_path, threads=1)
    evaluation = engine.loss(probe.adapter, probe.batch, probe.inputs)
    assert evaluation.loss == pytest.approx(probe.loss, rel=TOLERANCE)
    trained = engine.gradients(probe.adapter, probe.batch, probe.inputs)
    assert evaluation.correct == trained.correct


@pytest.mark.parametrize(("rank", "lengths"), [(1, (17,)), (8, (3, 30, 11))])
def test_engines_agree_at_other_ranks_and_lengths(
    place: Place, compiled: Compiled, tmp_path: Path, rank: int, lengths: tuple[int, ...]
) -> None:
    variant = {"precision": "nf4", "lowest": 0, "kept": (0, 1, 2)}
    manifest, _ = _placed(compiled, tmp_path, **variant, runtime=place.engine)
    rng = np.random.default_rng(rank)
    adapter: Tensors = {
        t.name: rng.normal(0, 0.2, [rank if n == "rank" else int(n) for n in t.shape]).astype("f4")
        for t in manifest.adapter
    }
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    batch = Batch(
        inputs={"input_ids": rng.integers(1, 50, mask.shape) * mask, "attention_mask": mask},
        labels=rng.integers(0, len(LABELS), len(lengths)),
        weights=np.full(len(lengths), 1 / len(lengths), np.float32),
    )
    result = place.gradients(tmp_path, manifest, adapter, batch)
    stock, _ = _placed(compiled, tmp_path, **variant, runtime="onnx")
    _check(result, PLACES[0].gradients(tmp_path, stock, adapter, batch))
