# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from lorikit.proto.manifest import Task, digest_of, dump, load
from lorikit.server.compile import Compiler
from lorikit.server.compile import compiler as compiler_module
from lorikit.server.compile.weights import PRECISIONS
from lorikit.server.errors import UnsupportedModelError, VerificationError
from lorikit.server.store.blobs import FolderBlobs

CODEC_OF_MATRIX = {
    "int4": "int8",  # its rows of 80 fill no blocks of 64
    "nf4": "nf4",
    "int8": "int8",
    "fp16": "fp16",
    "fp32": "fp32",
}
CODEC_OF_TABLE = {"int4": "int8", "nf4": "int8", "int8": "int8", "fp16": "fp16", "fp32": "fp32"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_package_agrees_with_torch_and_peft(compiler: Compiler, precision: str) -> None:
    package = compiler.package(precision=precision, lowest_trained_layer=0)

    assert package.manifest.facts["verified_relative_error"] <= 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_manifest_tells_the_codec_that_was_written(compiler: Compiler, precision: str) -> None:
    manifest = compiler.package(precision=precision, lowest_trained_layer=0).manifest

    codecs = {weight.name: weight.codec for weight in manifest.weights}

    assert codecs["bert.embeddings.word_embeddings.weight"] == CODEC_OF_TABLE[precision]
    assert (
        codecs["bert.encoder.layer.1.output.dense.base_layer.weight"] == CODEC_OF_MATRIX[precision]
    )
    assert codecs["bert.encoder.layer.1.output.dense.base_layer.bias"] == "fp32"


def test_depth_limits_what_trains_and_changes_no_blob_of_the_base(compiler: Compiler) -> None:
    full = compiler.package(precision="nf4", lowest_trained_layer=0).manifest
    shallow = compiler.package(precision="nf4", lowest_trained_layer=2).manifest

    trained = {tensor.layer for tensor in shallow.adapter if tensor.trained}

    assert trained == {2, -1}
    assert {t.name for t in shallow.adapter} == {t.name for t in full.adapter}
    assert shallow.weight_blobs == full.weight_blobs
    assert len(shallow.graph("train").outputs) < len(full.graph("train").outputs)


@pytest.mark.parametrize("kept", [(0, 2), (1, 2), (1,)])
def test_a_sub_model_needs_only_the_blobs_of_its_layers(
    compiler: Compiler, kept: tuple[int, ...]
) -> None:
    full = compiler.package(precision="int8", lowest_trained_layer=0).manifest
    part = compiler.package(precision="int8", lowest_trained_layer=0, kept_layers=kept).manifest

    assert part.facts["verified_relative_error"] <= 1e-4
    assert set(part.weight_blobs) < set(full.weight_blobs)
    assert {tensor.layer for tensor in part.adapter} == {*kept, -1}


def test_only_the_head_trains_when_no_layer_does(compiler: Compiler) -> None:
    manifest = compiler.package(precision="fp32", lowest_trained_layer=3).manifest

    assert {t.role for t in manifest.adapter if t.trained if t.layer >= 0} == set()
    assert "classifier.weight.grad" in manifest.graph("train").outputs


def test_weights_lie_outside_the_graph_in_blobs_named_by_digest(compiler: Compiler) -> None:
    package = compiler.package(precision="nf4", lowest_trained_layer=0)
    folder = compiler_folder(compiler)
    graph = package.manifest.graph("train")

    model = onnx.load(folder / graph.blob.digest, load_external_data=False)
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }

    assert places == {blob.digest for blob in package.manifest.weight_blobs}
    for blob in package.manifest.blobs():
        assert digest_of((folder / blob.digest).read_bytes()) == blob.digest


def test_ranks_batch_and_length_stay_symbolic(compiler: Compiler) -> None:
    graph = compiler.package(precision="fp32", lowest_trained_layer=0).manifest.graph("train")
    model = onnx.load(compiler_folder(compiler) / graph.blob.digest, load_external_data=False)

    dims = {
        info.name: [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in model.graph.input
    }

    assert dims["input_ids"] == ["batch", "length"]
    a, b = (
        dims[f"bert.encoder.layer.0.attention.self.query.lora_{factor}.weight"] for factor in "AB"
    )
    assert a == [b[1], 32]
    assert isinstance(a[0], str)


def test_the_manifest_survives_its_own_bytes(compiler: Compiler) -> None:
    package = compiler.package(precision="int8", lowest_trained_layer=1)

    assert load(dump(package.manifest)) == package.manifest
    assert digest_of(dump(package.manifest)) == package.ref.digest


def test_the_same_model_compiles_to_the_same_package(
    compiler: Compiler, tiny_model: Path, tmp_path: Path
) -> None:
    again = Compiler(
        tiny_model,
        compiler_task(compiler),
        targets=compiler.targets,
        blobs=FolderBlobs(tmp_path),
    )

    assert (
        again.package(precision="nf4", lowest_trained_layer=0).ref
        == compiler.package(precision="nf4", lowest_trained_layer=0).ref
    )


def test_a_graph_that_disagrees_is_not_published(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = compiler_module.make_probe
    compiler.package(precision="fp16", lowest_trained_layer=0)
    before = set(compiler.blobs.digests())

    def dishonest(*args, **kwargs):
        probe = honest(*args, **kwargs)
        names = [name for name in probe.gradients if "layer.1" in name]
        name = max(names, key=lambda name: np.linalg.norm(probe.gradients[name]))
        probe.gradients[name] *= 1.001
        return probe

    monkeypatch.setattr(compiler_module, "make_probe", dishonest)
    with pytest.raises(VerificationError, match=r"layer\.1\..* differs from torch"):
        compiler.package(precision="fp16", lowest_trained_layer=1)
    assert set(compiler.blobs.digests()) == before


def test_an_unknown_architecture_is_named_with_what_would_be_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))

    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*architectures\.py"):
        Compiler(tmp_path, TASK, targets=("c_attn",), blobs=FolderBlobs(tmp_path / "blobs"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        Compiler(tmp_path, TASK, targets=("query",), blobs=FolderBlobs(tmp_path / "blobs"))


def test_an_unknown_target_lists_what_there_is(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'q_proj'.*'query'"):
        Compiler(tiny_model, TASK, targets=("q_proj",), blobs=FolderBlobs(tmp_path))


def test_evaluation_gives_the_logits_of_torch(compiler: Compiler, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    adapter = compiler.initial(4, 0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=5, attn_implementation="eager"
    ).eval()
    model.classifier.weight.data = torch.from_numpy(adapter["classifier.weight"].copy())
    model.classifier.bias.data = torch.from_numpy(adapter["classifier.bias"].copy())
    ids = torch.tensor([[2, 5, 9, 3]])

    logits = compiler.logits(adapter, ["w1 w5", "w9 w9 w9"], lora_scale=2.0, max_length=16)

    # "w1" is word 5 and "w5" word 9 of the tiny tokeniser; B is zero, so LoRA adds nothing.
    np.testing.assert_allclose(logits[0], model(ids).logits[0].detach().numpy(), atol=1e-5)


@pytest.mark.skipif(
    "LORIKIT_TRAINING_PYTHON" not in os.environ,
    reason="LORIKIT_TRAINING_PYTHON names no interpreter with onnxruntime-training",
)
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_fused_gradients_agree_with_torch_in_the_training_runtime(
    tiny_model: Path, tmp_path: Path, precision: str
) -> None:
    compiler = Compiler(
        tiny_model,
        TASK,
        targets=("query", "value"),
        blobs=FolderBlobs(tmp_path),
        training_python=Path(os.environ["LORIKIT_TRAINING_PYTHON"]),
    )

    manifest = compiler.package(
        precision=precision, lowest_trained_layer=0, runtime="onnx-training"
    ).manifest

    assert manifest.graph("train", "onnx-training").runtime == "onnx-training"
    assert manifest.facts["verified_relative_error"] <= 1e-4


TASK = Task(kind="sequence-classification", labels=("a", "b", "c", "d", "e"))


def compiler_task(compiler: Compiler) -> Task:
    return compiler.package(precision="fp32", lowest_trained_layer=0).manifest.task


def compiler_folder(compiler: Compiler) -> Path:
    return compiler.blobs.folder
