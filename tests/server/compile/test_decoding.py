# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tests.server.compile.tiny_llama import WORDS, write_tiny_llama

from lorikit.proto.manifest import CacheShape, Task
from lorikit.proto.tensors import Tensors
from lorikit.server.compile.decoding import (
    cache_shape,
    can_decode,
    check_decoding_graph,
    decoding_graph,
    export_decoding,
)
from lorikit.server.compile.export import export_forward
from lorikit.server.compile.graph import Graph
from lorikit.server.compile.insertion import AdapterConfig
from lorikit.server.compile.models import Model, load_model
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.verify import Probe, make_probe
from lorikit.server.compile.weights import frozen_weights, store_base
from lorikit.server.errors import UnsupportedModelError, VerificationError
from lorikit.server.store.blobs import FolderBlobs

TASK = Task(kind="causal-language-modeling", labels=())
LORA = AdapterConfig(targets=("q_proj", "v_proj"))
LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_tiny_llama(tmp_path_factory.mktemp("llama"), layers=LAYERS)
    return load_model(folder, TASK, LORA)


@pytest.fixture(scope="module")
def decoding(model: Model) -> Graph:
    return export_decoding(model)


def _session(graph: Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options)


def _adapter(model: Model, seed: int = 1) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        t.name: rng.normal(0, 0.1, [4 if n == "rank" else int(n) for n in t.shape]).astype(
            "float32"
        )
        for t in model.adapter
    }


def _greedy(
    graph: Graph, adapter: Tensors, prompt: list[int], count: int, shape: CacheShape
) -> list[int]:
    session = _session(graph)
    names = [port.name for port in session.get_outputs()]
    cache = {
        port.name: np.zeros((0, 1, shape.heads, shape.width), np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past.")
    }
    tokens, step, past = [], prompt, 0
    for _ in range(count):
        ids = np.array([step])
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(past, past + len(step))[None],
            "past_mask": np.ones((1, past), np.int64),
            "lora_scale": np.array(2.0, np.float32),
        }
        known = {port.name for port in session.get_inputs()}
        given = {n: v for n, v in {**feeds, **cache, **adapter}.items() if n in known}
        found = dict(zip(names, session.run(names, given), strict=True))
        for name in cache:
            cache[name] = np.concatenate([cache[name], found[name.replace("past", "new")]])
        past += len(step)
        tokens.append(int(found["logits"][0].argmax()))
        step = tokens[-1:]
    return tokens


@contextlib.contextmanager
def _only(model: Model, kept: tuple[int, ...]) -> Iterator[None]:
    """Leave some layers in place, numbered as transformers' own cache wants them."""
    config, before = model.module.config, model.module.config.num_hidden_layers
    with model.with_layers(kept):
        config.num_hidden_layers = len(kept)
        for place, layer in enumerate(model.layers):
            layer.self_attn.layer_idx = place
        yield
        config.num_hidden_layers = before
        for number, layer in zip(kept, model.layers, strict=True):
            layer.self_attn.layer_idx = number


def _torch_greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.module.generate(  # type: ignore[operator]  # transformers' models have it
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    result: list[int] = found[0, len(prompt) :].tolist()
    return result


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (0, 3), (2, 3)])
def test_graph_continues_a_text_as_transformers_does(
    model: Model, decoding: Graph, kept: tuple[int, ...]
) -> None:
    graph = decoding_graph(decoding, model, kept)
    adapter = _adapter(model)

    found = _greedy(graph, adapter, [1, 20, 30, 40], 30, cache_shape(model))

    model.set_adapter(adapter, 2.0)
    with _only(model, kept):
        expected = _torch_greedy(model, [1, 20, 30, 40], 30)
    assert found == expected
    assert len(set(found)) > 3  # a model that says one word for ever would prove little


def test_cache_is_named_by_layer_and_its_first_axis_are_tokens(
    model: Model, decoding: Graph
) -> None:
    graph = decoding_graph(decoding, model, (1, 3))

    inputs = {port.name: port.shape for port in graph.inputs if port.name.startswith("past.")}
    outputs = {port.name: port.shape for port in graph.outputs}

    parts = ("1.key", "1.value", "3.key", "3.value")
    assert inputs == {f"past.{part}": ("past", "batch", 2, 16) for part in parts}
    assert outputs == {
        "logits": ("batch", len(WORDS)),
        **{f"new.{part}": ("step", "batch", 2, 16) for part in parts},
    }
    assert cache_shape(model) == CacheShape(heads=2, width=16)


@pytest.fixture(scope="module")
def probed(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[FolderBlobs, Probe]:
    forward = export_forward(model)
    frozen, tables = frozen_weights(forward, {n for n, _ in model.module.named_parameters()})
    blobs = FolderBlobs(tmp_path_factory.mktemp("blobs"))
    base = store_base(frozen, tables, model.architecture, "fp32", blobs.put)
    trained = [tensor.name for tensor in model.adapter]
    return blobs, make_probe(model, base, range(LAYERS), trained)


def test_graph_reads_padded_texts_in_parts_as_torch_reads_them_whole(
    model: Model, decoding: Graph, probed: tuple[FolderBlobs, Probe]
) -> None:
    blobs, probe = probed
    graph = decoding_graph(decoding, model, range(LAYERS))
    ref = blobs.put(to_onnx(graph).SerializeToString())

    assert check_decoding_graph(blobs.path(ref.digest), probe) < 1e-4

    spoilt = replace(probe, adapter={n: v * np.float32(1.1) for n, v in probe.adapter.items()})
    with pytest.raises(VerificationError, match="logits"):
        check_decoding_graph(blobs.path(ref.digest), spoilt)


def test_graph_is_the_same_each_time(model: Model, decoding: Graph) -> None:
    first, second = (decoding_graph(decoding, model, range(LAYERS)) for _ in range(2))
    assert to_onnx(first) == to_onnx(second)


def test_model_that_names_classes_has_no_decoding_graph(tiny_model: Path) -> None:
    task = Task(kind="sequence-classification", labels=("a", "b"))
    classifier = load_model(tiny_model, task, AdapterConfig(targets=("query",)))

    assert not can_decode(classifier)
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification"):
        export_decoding(classifier)
