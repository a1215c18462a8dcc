# SPDX-License-Identifier: Apache-2.0
"""Folders of every kind of adapter: the lines of their model card against the compiled package."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import transformers
from pydantic import ValidationError
from tests.server.compile.tiny_llama import write_tiny_llama

from lorikit.proto.manifest import Manifest, Task
from lorikit.proto.tensors import Tensors
from lorikit.server.app import open_run_parts
from lorikit.server.compile import Compiler
from lorikit.server.compile.architectures import TASK_KINDS
from lorikit.server.compile.insertion import KINDS, AdapterConfig
from lorikit.server.compile.verify import open_session
from lorikit.server.config import RunConfig
from lorikit.server.export import ExportError, read_adapter, write_adapter
from lorikit.server.export_card import AUTO_CLASSES
from lorikit.server.export_layout import ROLES, is_in_peft
from lorikit.server.methods.base import AdapterSpace
from lorikit.server.store.blobs import FolderBlobs

OWN_NOISE = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
"""PEFT asks transformers 5 for an attribute by its older name; nothing of ours."""

pytestmark = pytest.mark.filterwarnings(OWN_NOISE)

Array = npt.NDArray[Any]

LABELS = ("refuse", "agree", "ask")
SCALE, RANK, TOKENS, VOCABULARY = 1.5, 3, 5, 60

SEQUENCE, TOKEN = "sequence-classification", "token-classification"
MASKED, CAUSAL = "masked-language-modeling", "causal-language-modeling"
IMAGE = "image-classification"


def small(config: Any, **sizes: int) -> Any:
    return config(
        vocab_size=VOCABULARY + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        **sizes,
    )


MODELS = {
    "masked": lambda: transformers.BertForMaskedLM(small(transformers.BertConfig)),
    "roberta": lambda: transformers.RobertaModel(small(transformers.RobertaConfig)),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    ),
}


@pytest.fixture(scope="module")
def model_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {"bert": tiny_model}

    def folder_of(name: str) -> Path:
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            if name == "llama":
                return write_tiny_llama(folder)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                module = MODELS[name]()
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, std=0.5)
            module.save_pretrained(folder)
            shutil.copy(tiny_model / "tokenizer.json", folder)
            if name == "vit":
                size = {"height": 16, "width": 16}
                transformers.ViTImageProcessor(size=size).save_pretrained(folder)
        return made[name]

    return folder_of


@pytest.fixture(scope="module")
def make_compiler(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    blobs = FolderBlobs(tmp_path_factory.mktemp("blobs"))
    made: dict[tuple[str, str, str], Compiler] = {}

    def make(kind: str, model: str = "bert", task: str = SEQUENCE) -> Compiler:
        if (model, task, kind) not in made:
            made[model, task, kind] = Compiler(
                model_folder(model),
                Task(kind=task, labels=LABELS if TASK_KINDS[task].trains_head else ()),
                adapter=AdapterConfig(kind=kind, size=TOKENS),
                blobs=blobs,
            )
        return made[model, task, kind]

    return make


def far_from_start(compiler: Compiler) -> Tensors:
    """Values with which each part of an adapter does something."""
    rng = np.random.default_rng(5)
    space = compiler.space(RANK)
    values = compiler.initial(RANK, 0)
    for tensor in space.tensors:
        noise = rng.normal(0, 0.2, values[tensor.name].shape)
        values[tensor.name] = (values[tensor.name] * 1.2 + noise).astype(np.float32)
    return values


def batch_of(task: str) -> dict[str, Array]:
    rng = np.random.default_rng(6)
    if task == IMAGE:
        return {"pixel_values": rng.normal(0, 1, (2, 3, 16, 16)).astype(np.float32)}
    mask = np.ones((3, 9), np.int64)
    mask[1, 6:] = 0
    return {"input_ids": rng.integers(4, VOCABULARY, (3, 9)), "attention_mask": mask}


def session_of(compiler: Compiler, graph: str) -> Any:
    manifest: Manifest = compiler.package(precision="fp32", lowest_trained_layer=0).manifest
    return open_session(compiler.blobs.path(manifest.graph(graph).blob.digest))


def run(session: Any, output: str, feeds: Mapping[str, Array]) -> Array:
    known = {port.name for port in session.get_inputs()}
    (value,) = session.run([output], {n: v for n, v in feeds.items() if n in known})
    return np.asarray(value)


def of_the_package(compiler: Compiler, task: str, adapter: Tensors) -> Array:
    """Logits; for a frozen vocabulary, whose graphs have none, the loss of each real token."""
    batch = batch_of(task)
    feeds = {**batch, **adapter, "lora_scale": np.asarray(SCALE, np.float32)}
    if TASK_KINDS[task].trains_head:
        return run(session_of(compiler, "predict"), "logits", feeds)
    session = session_of(compiler, "evaluate")
    losses = []
    for place in zip(*np.nonzero(batch["attention_mask"]), strict=True):
        weights = np.zeros(batch["input_ids"].shape, np.float32)
        weights[place] = 1
        given = {**feeds, "labels": batch["input_ids"], "weights": weights}
        losses.append(run(session, "loss", given))
    return np.array(losses)


def of_the_module(module: Any, task: str, prompt_tokens: int) -> Array:
    """What ``of_the_package`` returns, of a module of torch."""
    batch = {name: torch.from_numpy(values) for name, values in batch_of(task).items()}
    with torch.no_grad():
        logits = module(**batch).logits
    if TASK_KINDS[task].labels_tokens:
        logits = logits[:, prompt_tokens:]
    if TASK_KINDS[task].trains_head:
        return logits.numpy()
    ids, real = batch["input_ids"], batch["attention_mask"] > 0
    chosen = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    return -chosen[real].numpy()


def loaded_by_its_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the lines of the folder's README in the folder."""
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    names: dict[str, Any] = {}
    with monkeypatch.context() as here:
        here.chdir(folder)
        exec(compile(snippet[1], "README.md", "exec"), names)
    return names["model"].eval()


def exported(
    folder: Path, base: Path, compiler: Compiler, adapter: Tensors, **changes: Any
) -> Path:
    task = compiler._task
    return write_adapter(
        folder,
        adapter,
        space=compiler.space(RANK),
        base_model=str(base),
        targets=compiler.targets,
        labels=task.labels,
        task_kind=task.kind,
        **{"scale": SCALE, **changes},
    )


def slow(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "task", "kind"),
    [
        *(("bert", SEQUENCE, kind) for kind in KINDS),
        ("llama", CAUSAL, "lora"),
        ("llama", CAUSAL, "prompt"),
        *(slow("llama", CAUSAL, kind) for kind in ("dora", "ia3", "bottleneck")),
        slow("bert", TOKEN, "lora"),
        ("roberta", TOKEN, "prompt"),
        slow("masked", MASKED, "lora"),
        ("masked", MASKED, "prompt"),
        ("roberta", SEQUENCE, "lora"),
        slow("roberta", SEQUENCE, "prompt"),
        slow("roberta", SEQUENCE, "head"),
        ("vit", IMAGE, "lora"),
        slow("vit", IMAGE, "bottleneck"),
    ],
)
def test_card_loads_what_the_package_computes(
    model: str,
    task: str,
    kind: str,
    model_folder: Any,
    make_compiler: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = model_folder(model)
    compiler = make_compiler(kind, model, task)
    adapter = far_from_start(compiler)

    folder = exported(tmp_path / "a", base, compiler, adapter)
    module = loaded_by_its_card(folder, monkeypatch)

    prompt_tokens = TOKENS if kind == "prompt" else 0
    wanted = of_the_package(compiler, task, adapter)
    np.testing.assert_allclose(of_the_module(module, task, prompt_tokens), wanted, atol=1e-4)
    assert np.abs(wanted - of_the_package(compiler, task, compiler.initial(RANK, 0))).max() > 0.01
    assert isinstance(module, peft.PeftModel) is is_in_peft(kind)
    back = read_adapter(folder)
    assert (back.kind, back.labels) == (kind, compiler._task.labels)
    assert back.tensors.keys() == adapter.keys()
    assert all(np.array_equal(back.tensors[name], adapter[name]) for name in adapter)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if is_in_peft(kind)])
def test_keys_are_those_peft_itself_would_save(
    kind: str, make_compiler: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = make_compiler(kind)
    adapter = far_from_start(compiler)
    module = loaded_by_its_card(
        exported(tmp_path / "a", tiny_model, compiler, adapter), monkeypatch
    )

    module.save_pretrained(tmp_path / "b", save_embedding_layers=False)

    back = read_adapter(tmp_path / "b")
    assert back.kind == kind
    assert back.tensors.keys() == adapter.keys()
    assert all(np.array_equal(back.tensors[name], adapter[name]) for name in adapter)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_in_peft(kind)])
def test_peft_refuses_a_kind_it_lacks_and_says_where_to_look(
    kind: str, make_compiler: Any, tiny_model: Path, tmp_path: Path
) -> None:
    compiler = make_compiler(kind)
    folder = exported(tmp_path / "a", tiny_model, compiler, compiler.initial(RANK, 0))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model)

    with pytest.raises(KeyError, match=rf"{kind} \(not in PEFT, README.md"):
        peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rank_stabilised_form_has_the_same_scale_at_every_rank(
    kind: str, make_compiler: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = make_compiler(kind)
    adapter = far_from_start(compiler)
    narrow = next(t.module for t in compiler.space(RANK).tensors if t.role == "lora_A")
    a, b = f"{narrow}.lora_A.weight", f"{narrow}.lora_B.weight"
    adapter |= {a: adapter[a][:2], b: adapter[b][:, :2]}
    write = partial(exported, base=tiny_model, compiler=compiler, adapter=adapter)

    plain, stabilised = write(tmp_path / "a"), write(tmp_path / "b", use_rslora=True)

    config = json.loads((stabilised / "adapter_config.json").read_text())
    assert config["use_rslora"]
    assert config["lora_alpha"] == pytest.approx(SCALE * 3**0.5)
    assert config["alpha_pattern"] == {narrow: pytest.approx(SCALE * 2**0.5)}
    assert read_adapter(stabilised).scale == pytest.approx(SCALE)
    results = [
        of_the_module(loaded_by_its_card(folder, monkeypatch), SEQUENCE, 0)
        for folder in (plain, stabilised)
    ]
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "left_out", "message"),
    [
        ("dora", "0.attention.self.query.lora_magnitude_vector", "is missing beside the others"),
        ("bottleneck", "0.attention.self.query.adapter_up.bias", "is missing beside the others"),
        ("prompt", "classifier.bias", "is missing beside the others"),
        ("ia3", "ia3_l", "none of the model's tensors of the roles \\['ia3'\\]"),
        ("dora", "lora_magnitude_vector", "is missing beside the others"),
        ("bitfit", "", "none of the model's tensors"),
    ],
)
def test_part_of_an_adapter_is_refused(
    kind: str, left_out: str, message: str, make_compiler: Any, tiny_model: Path, tmp_path: Path
) -> None:
    compiler = make_compiler(kind)
    values = compiler.initial(RANK, 0)
    part = {name: value for name, value in values.items() if left_out not in name}

    with pytest.raises(ExportError, match=message):
        exported(tmp_path / "a", tiny_model, compiler, part)
    assert not any(tmp_path.iterdir())


def test_mixture_of_kinds_is_refused(make_compiler: Any, tiny_model: Path, tmp_path: Path) -> None:
    spaces = [make_compiler(kind).space(RANK) for kind in ("ia3", "bitfit")]
    mixed = {t.name: t for space in spaces for t in space.tensors}
    space = AdapterSpace(tensors=tuple(mixed.values()), layer_count=3, max_rank=RANK)
    values = {name: np.ones([int(n) for n in t.shape], np.float32) for name, t in mixed.items()}

    with pytest.raises(ExportError, match=r"roles \['bias', 'ia3'\]; the kinds are lora"):
        write_adapter(tmp_path / "a", values, space=space, base_model="x", targets=(), scale=1.0)


def test_tables_agree_with_those_of_the_compiler() -> None:
    assert {name: kind.auto_class for name, kind in TASK_KINDS.items()} == AUTO_CLASSES
    assert tuple(ROLES) == KINDS


@pytest.mark.parametrize("kind", ["ia3", "prompt", "bottleneck", "bitfit", "head"])
def test_rank_stabilised_form_of_a_kind_without_rank_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"use_rslora: adapter '.*' has no rank"):
        RunConfig(name="a", model=tmp_path, labels=LABELS, rounds=1, adapter=kind, use_rslora=True)


def test_run_writes_folders_of_its_kind_and_task(tmp_path: Path, model_folder: Any) -> None:
    config = RunConfig(
        name="a",
        model=model_folder("llama"),
        task_kind=CAUSAL,
        adapter="dora",
        rounds=1,
        max_rank=4,
        lora_scale=SCALE,
        use_rslora=True,
    )
    parts = open_run_parts(config, FolderBlobs(tmp_path / "blobs"))

    parts.export(tmp_path / "a", parts.source.initial(4, 0), 4)

    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["peft_type"], written["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (written["use_dora"], written["use_rslora"], written["lora_alpha"]) == (True, True, 3)
    assert "AutoModelForCausalLM" in (tmp_path / "a" / "README.md").read_text()
