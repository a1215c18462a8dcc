# SPDX-License-Identifier: Apache-2.0
"""Every kind of task from a model folder to what an app gets: compiled, trained on rows, used."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.server.compile.tiny_llama import write_tiny_llama

from lorikit.proto.manifest import Task
from lorikit.proto.plan import OptimizerConfig, Phase, Plan
from lorikit.proto.tensors import Bundle, Tensors, pack, raw
from lorikit.quantization import codec
from lorikit.sdk._data import Row, read_dataset
from lorikit.sdk._generation import Sampling
from lorikit.sdk._model import LocalModel
from lorikit.sdk._plan import PlanExecutor
from lorikit.sdk._store import LastAdapter, Store
from lorikit.sdk.engines import open_engine
from lorikit.server.compile import Compiler
from lorikit.server.compile.package import Package
from lorikit.server.store.blobs import FolderBlobs

pytestmark = pytest.mark.slow

INPUTS = {"lora_scale": 2.0}
LENGTH = 24


@dataclass
class Device:
    """A device's store with one compiled package, and what it makes of its rows."""

    compiler: Compiler
    package: Package
    store: Store

    @classmethod
    def of(cls, model: Path, task: Task, folder: Path, *targets: str, precision: str) -> Device:
        blobs = FolderBlobs(folder / "blobs")
        compiler = Compiler(model, task, targets=targets, blobs=blobs)
        package = compiler.package(precision=precision, lowest_trained_layer=0)
        store = Store(folder / "store")
        for blob in (package.ref, *package.manifest.blobs()):
            shutil.copy(blobs.path(blob.digest), store.blobs.path(blob.digest))
        store.close()
        return cls(compiler, package, store)

    def train(self, rows: Sequence[Row], steps: int = 40, rate: float = 0.02) -> list[float]:
        """Train from the start values, use the result from now on; the losses by step."""
        manifest = self.package.manifest
        blob = manifest.tokenizer
        tokenizer = None if blob is None else self.store.blobs.read(blob)
        data = read_dataset(rows, manifest, tokenizer, LENGTH)
        start = self.compiler.initial(4, 0)
        phase = Phase(
            train=tuple(t.name for t in manifest.adapter if t.trained),
            steps=steps,
            batch_size=8,
            micro_batch=3,
            optimizer=OptimizerConfig(learning_rate=rate),
        )
        losses: list[float] = []
        engine = open_engine("onnx", manifest, self.store.blobs.folder, threads=1)
        outcome = PlanExecutor(
            engine,
            manifest,
            data,
            journal=self.store.journal,
            emit=lambda event: losses.append(event.loss),  # type: ignore[attr-defined]
            cancelled=lambda: False,
        ).run(
            Plan(method="test", inputs=INPUTS, phases=(phase,), max_length=LENGTH, seed=1),
            start,
            "task",
        )
        engine.close()
        sent = outcome.bundle.tensors
        self.adapter = {**start, **{n: codec(v.codec).decode(v) for n, v in sent.items()}}
        self._use(self.adapter)
        return losses

    def model(self) -> LocalModel:
        return LocalModel(self.store, engine="onnx", threads=1)

    def _use(self, adapter: Tensors) -> None:
        bundle = pack(Bundle({name: raw(value) for name, value in adapter.items()}))
        blobs = self.compiler.blobs
        ref = blobs.put(bundle)
        shutil.copy(blobs.path(ref.digest), self.store.blobs.path(ref.digest))
        every = (self.package.ref, ref, *self.package.manifest.blobs())
        self.store.save_last_adapter(
            LastAdapter(
                run_id="run",
                package=self.package.ref,
                adapter=ref,
                inputs=INPUTS,
                max_length=LENGTH,
                blobs=tuple(blob.digest for blob in every),
            )
        )


def test_language_model_learns_a_text_and_continues_it(tmp_path: Path) -> None:
    task = Task(kind="causal-language-modeling", labels=())
    folder = write_tiny_llama(tmp_path / "model")
    device = Device.of(folder, task, tmp_path, "q_proj", "v_proj", "down_proj", precision="fp32")
    song = " ".join(f"w{n * 5 % 31}" for n in range(400))
    pair = {"prompt": "w80 w81", "response": " w82 w83"}

    losses = device.train([song, *[pair] * 12], steps=120)

    model = device.model()
    assert losses[-1] < 0.3 * losses[0]
    metrics = model.evaluate([pair])
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]), rel=1e-6)
    assert metrics["accuracy"] == 1  # the response and the end token
    (answer,) = model.generate(["w80 w81"], Sampling(max_new_tokens=8))
    assert (answer.text, answer.finish) == (" w82 w83", "end")

    ids = torch.tensor([[1, *(n * 5 % 31 + 3 for n in range(6))]])
    torch_model = device.compiler._model
    torch_model.set_adapter(device.adapter, INPUTS["lora_scale"])
    expected = torch_model.module.generate(  # type: ignore[operator]  # transformers' models have it
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :]
    (verse,) = model.generate(
        [" ".join(f"w{n * 5 % 31}" for n in range(6))], Sampling(max_new_tokens=12)
    )
    assert verse.text == "".join(f" w{n - 3}" for n in expected.tolist() if n > 2)


def _bert(source: Path, folder: Path) -> Path:
    """The tiny BERT with a mask token in its tokeniser."""
    shutil.copytree(source, folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), mask_token="w59", pad_token="[PAD]"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_words_are_labelled_as_they_are_measured(tiny_model: Path, tmp_path: Path) -> None:
    task = Task(kind="token-classification", labels=("O", "B-odd", "I-odd"))
    device = Device.of(tiny_model, task, tmp_path, "query", "value", precision="int8")
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for _ in range(24):
        numbers = rng.integers(0, 20, rng.integers(2, 9))
        rows.append(([f"w{n}" for n in numbers], [int(n % 2) for n in numbers]))

    losses = device.train(rows, steps=40)

    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    model = device.model()
    found = model.predict([list(words) for words, _ in rows])
    hits = [
        each.label == task.labels[label]
        for predictions, (_, labels) in zip(found, rows, strict=True)
        for each, label in zip(predictions, labels, strict=True)
    ]
    assert model.evaluate(rows)["accuracy"] == pytest.approx(np.mean(hits))


def test_masked_words_are_guessed(tiny_model: Path, tmp_path: Path) -> None:
    task = Task(kind="masked-language-modeling", labels=())
    folder = _bert(tiny_model, tmp_path / "model")
    device = Device.of(folder, task, tmp_path, "query", "value", "dense", precision="nf4")
    rows = [" ".join(f"w{n}" for n in (k, k, k, k, k, k)) for k in range(8)]

    losses = device.train(rows, steps=60)

    assert device.package.manifest.text is not None
    assert device.package.manifest.text.mask_id == 63
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    metrics = device.model().evaluate(rows)
    assert metrics["loss"] < losses[0]
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]), rel=1e-6)


def test_images_learn_their_labels(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    task = Task(kind="image-classification", labels=("dark", "light"))
    device = Device.of(tmp_path / "model", task, tmp_path, "q_proj", "v_proj", precision="fp32")
    rng = np.random.default_rng(0)
    rows: list[Row] = [
        (rng.integers(128 * (n % 2), 128 * (n % 2) + 128, (20, 30, 3)).astype(np.uint8), n % 2)
        for n in range(16)
    ]

    losses = device.train(rows, steps=40)

    assert losses[-1] < 0.3 * losses[0]
    model = device.model()
    assert model.evaluate(rows)["accuracy"] == 1
    found = model.predict([np.zeros((9, 9), np.uint8), np.ones((3, 5, 7))])
    assert [each.label for each in found] == ["dark", "light"]  # type: ignore[union-attr]
