# SPDX-License-Identifier: Apache-2.0
"""Every architecture and every kind of adapter becomes a verified package.

Sizes are unequal on purpose: heads that share keys, feed-forward of another width, four layers of
which only two are exported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from lorikit.proto.manifest import Task
from lorikit.server.compile import Compiler
from lorikit.server.compile.architectures import ARCHITECTURES, TASK_KINDS
from lorikit.server.compile.insertion import KINDS, AdapterConfig
from lorikit.server.compile.verify import (
    TOLERANCE,
    Probe,
    check_train_graph,
    make_probe,
    run_graph,
)
from lorikit.server.errors import UnsupportedModelError, VerificationError
from lorikit.server.store.blobs import FolderBlobs

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 70,
    "max_position_embeddings": 40,
}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "max_relative_positions": -1,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**SHAPE),
    "roberta": lambda: transformers.RobertaConfig(**SHAPE),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, hidden_dim=80, n_layers=4, n_heads=4, vocab_size=70, max_position_embeddings=40
    ),
    "deberta": lambda: transformers.DebertaConfig(**SHAPE, **RELATIVE),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **SHAPE, **RELATIVE, share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=8
    ),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(
        **SHAPE, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    ),
    "mobilenet_v2": lambda: transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.35),
}
LABELS = ("a", "b", "c")


def save_model(folder: Path, model_type: str, kind: str) -> Path:
    """A model folder with random weights, and a tokeniser of a few words."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build = getattr(transformers, TASK_KINDS[kind].auto_class).from_config
        build(CONFIGS[model_type]()).save_pretrained(folder)
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "w0", "w1"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def compiler_for(folder: Path, model_type: str, kind: str, adapter: AdapterConfig) -> Compiler:
    labels = LABELS if TASK_KINDS[kind].trains_head else ()
    return Compiler(
        save_model(folder / "model", model_type, kind),
        Task(kind=kind, labels=labels),
        adapter=adapter,
        blobs=FolderBlobs(folder / "blobs"),
    )


@pytest.mark.parametrize(("model_type", "kind"), ARCHITECTURES, ids="-".join)
def test_an_architecture_agrees_with_torch(tmp_path: Path, model_type: str, kind: str) -> None:
    adapter = AdapterConfig(kind="head") if model_type == "mobilenet_v2" else AdapterConfig()
    compiler = compiler_for(tmp_path, model_type, kind, adapter)
    layers = compiler.layer_count

    whole = compiler.package(precision="int4", lowest_trained_layer=0).manifest
    part = compiler.package(
        precision="int8", lowest_trained_layer=layers - 1, recomputed_layers=(layers - 1,)
    ).manifest

    for manifest in (whole, part):
        assert manifest.facts["verified_relative_error"] <= 1e-4
    names = {graph.name for graph in whole.graphs}
    assert {"train", "evaluate"} <= names
    assert ("predict" in names) == TASK_KINDS[kind].trains_head
    assert ("decode" in names) == (kind == "causal-language-modeling")
    assert manifest.architecture == ARCHITECTURES[model_type, kind].class_name


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("bert", "sequence-classification"), ("llama", "causal-language-modeling")],
    ids="-".join,
)
def test_an_adapter_kind_agrees_with_torch(
    tmp_path: Path, model_type: str, kind: str, adapter: str
) -> None:
    if model_type == "llama" and adapter in ("head", "bitfit"):
        with pytest.raises(UnsupportedModelError, match="leaves nothing to train"):
            compiler_for(tmp_path, model_type, kind, AdapterConfig(kind=adapter))
        return

    compiler = compiler_for(tmp_path, model_type, kind, AdapterConfig(kind=adapter, size=3))
    manifest = compiler.package(precision="nf4", lowest_trained_layer=0).manifest
    initial = compiler.initial(4, 0)

    assert manifest.facts["verified_relative_error"] <= 1e-4
    assert {tensor.name for tensor in manifest.adapter} == initial.keys()
    trained = {tensor.name for tensor in manifest.adapter if tensor.trained}
    outputs = {name.removesuffix(".grad") for name in manifest.graph("train").outputs}
    assert trained == outputs - {"loss", "correct"}


def test_kept_layers_of_a_deep_model_agree_with_torch(tmp_path: Path) -> None:
    compiler = compiler_for(tmp_path, "llama", "causal-language-modeling", AdapterConfig())

    manifest = compiler.package(
        precision="int8", lowest_trained_layer=1, kept_layers=(0, 1, 3)
    ).manifest

    assert manifest.facts["verified_relative_error"] <= 1e-4
    assert {tensor.layer for tensor in manifest.adapter} == {0, 1, 3}


def test_token_losses_are_those_of_torch(tmp_path: Path) -> None:
    compiler = compiler_for(tmp_path, "llama", "causal-language-modeling", AdapterConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    rows = [torch.tensor([[2, 3, 2, 2]]), torch.tensor([[3, 3]])]
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in rows]

    measured = compiler.token_losses(
        compiler.initial(2, 0), ["w0 w1 w0 w0", "w1 w1"], lora_scale=2.0, max_length=8
    )

    assert measured.tokens == 4
    assert measured.loss == pytest.approx(sum(losses), rel=1e-4)
    assert measured.metrics()["perplexity"] == pytest.approx(np.exp(sum(losses) / 4), rel=1e-4)


def test_a_package_in_which_nothing_trains_is_refused(tmp_path: Path) -> None:
    compiler = compiler_for(tmp_path, "llama", "causal-language-modeling", AdapterConfig())

    with pytest.raises(UnsupportedModelError, match="train from layer 3 at the latest"):
        compiler.package(precision="fp32", lowest_trained_layer=4)


def test_an_unknown_adapter_kind_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'vera' is not one of lora, dora"):
        AdapterConfig(kind="vera")


@pytest.mark.parametrize("kept", [None, (0, 2, 3)])
def test_lora_dropout_agrees_with_torch(tmp_path: Path, kept: tuple[int, ...] | None) -> None:
    adapter = AdapterConfig(dropout=0.3)
    compiler = compiler_for(tmp_path, "bert", "sequence-classification", adapter)

    manifest = compiler.package(
        precision="int8", lowest_trained_layer=1, kept_layers=kept, recomputed_layers=(2,)
    ).manifest

    assert manifest.facts["verified_relative_error"] <= 1e-4
    assert "dropout_seed" in manifest.graph("train").inputs
    assert "dropout_seed" not in manifest.graph("evaluate").inputs


@pytest.mark.parametrize("adapter", ["dora", "prompt"])
def test_dropout_is_refused_where_there_is_none(adapter: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{adapter!r} has no dropout"):
        AdapterConfig(kind=adapter, dropout=0.1)


def test_a_gradient_that_is_zero_but_for_rounding_may_be_off_by_rounding(tmp_path: Path) -> None:
    compiler = compiler_for(
        tmp_path, "bert", "sequence-classification", AdapterConfig(kind="bitfit")
    )
    manifest = compiler.package(precision="fp32", lowest_trained_layer=0).manifest
    trained = [tensor.name for tensor in manifest.adapter if tensor.trained]
    path = compiler.blobs.path(manifest.graph("train").blob.digest)
    probe = make_probe(compiler._model, compiler._base("fp32"), manifest.kept_layers, trained)
    name = next(name for name in trained if name.endswith("0.attention.self.key.bias"))

    def off_by(norm: float) -> Probe:
        error = np.full_like(probe.gradients[name], norm / probe.gradients[name].size ** 0.5)
        gradients = {**probe.gradients, name: run_graph(path, probe)[f"{name}.grad"] + error}
        return replace(probe, gradients=gradients, rounding={name: 1e-3})

    # Softmax does not see what all keys of a text have in common.
    assert probe.rounding.keys() >= {n for n in trained if n.endswith("key.bias")}
    assert 0 < probe.rounding[name] < 1e-6
    assert check_train_graph(path, off_by(3.9e-3)) <= TOLERANCE
    with pytest.raises(VerificationError, match=r"0\.attention\.self\.key\.bias"):
        check_train_graph(path, off_by(4.1e-3))
