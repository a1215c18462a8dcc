# SPDX-License-Identifier: Apache-2.0
"""Real packages of a few nodes for words, images and texts to continue, with their arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import put

from lorikit.proto.manifest import (
    AdapterTensor,
    CacheShape,
    Graph,
    ImageInput,
    Manifest,
    Task,
    TextInput,
    digest_of,
    dump,
)
from lorikit.proto.tensors import Bundle, Tensors, pack, raw
from lorikit.sdk._model import LocalModel
from lorikit.sdk._store import LastAdapter, Store

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
PAD, BEGIN, END, MASK = range(4)
WORDS = (*SPECIAL, *(f"w{n}" for n in range(36)))
WIDTH, POSITIONS = 6, 90
BIAS = "head.bias"
INPUTS = {"lora_scale": 2.0}


def word_tokenizer() -> bytes:
    """Words w0 ... w35, each text behind ``<s>``."""
    tokenizers = pytest.importorskip("tokenizers", reason="reading text needs tokenizers")
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    return tokenizer.to_str().encode()


@dataclass(frozen=True)
class Weights:
    """Frozen numbers of a tiny model."""

    embedding: np.ndarray
    position: np.ndarray
    head: np.ndarray
    """[classes, width]"""


def weights(classes: int, width: int = WIDTH, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights(
        rng.standard_normal((len(WORDS), width)).astype(np.float32),
        rng.standard_normal((POSITIONS, width)).astype(np.float32),
        rng.standard_normal((classes, width)).astype(np.float32),
    )


def adapter(classes: int, seed: int = 1) -> Tensors:
    return {BIAS: np.random.default_rng(seed).standard_normal(classes).astype(np.float32)}


def language_logits(frozen: Weights, bias: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Logits of what follows: the head on tanh of all tokens' sum, each marked by its place."""
    embedded = frozen.embedding[list(ids)].astype(np.float64)
    keys = embedded * frozen.position[: len(ids)]
    state = np.tanh(keys.sum(0)) + 0.1 * embedded.sum(0)
    return INPUTS["lora_scale"] * state @ frozen.head.T.astype(np.float64) + bias


_DECODE = """
    Gather embedding input_ids -> embedded
    Gather position position_ids -> place
    Mul embedded place -> marked
    Transpose(1,0,2) marked -> k3
    Unsqueeze k3 two -> new.0.key
    Transpose(1,0,2) embedded -> v3
    Unsqueeze v3 two -> new.0.value
    Concat(0) past.0.key new.0.key -> keys
    Concat(0) past.0.value new.0.value -> values
    Concat(1) past_mask attention_mask -> mask
    Cast mask -> numbers
    Transpose(1,0) numbers -> columns
    Unsqueeze columns ends -> weight
    Mul keys weight -> wk
    Mul values weight -> wv
    ReduceSum wk zero -> sk
    ReduceSum wv zero -> sv
    Tanh sk -> hk
    Mul sv tenth -> hv
    Add hk hv -> state
    Squeeze state one -> flat
    MatMul flat headT -> z
    Mul z lora_scale -> scaled
    Add scaled head.bias -> logits
"""
_WORDS = """
    Gather embedding input_ids -> features
    MatMul features headT -> z
    Mul z lora_scale -> scaled
    Add scaled head.bias -> logits
"""
_IMAGES = """
    ReduceMean pixel_values -> features
    MatMul features headT -> z
    Mul z lora_scale -> scaled
    Add scaled head.bias -> logits
"""
_LOSS = """
    LogSoftmax logits -> logp
    Unsqueeze labels last -> index
    GatherElements logp index -> picked
    Squeeze picked last -> own
    Mul own weights -> weighted
    ReduceSum weighted -> total
    Neg total -> loss
    ArgMax logits -> guess
    Equal guess labels -> hit
    Greater weights none -> counted
    And hit counted -> both
    Cast both -> hits
    ReduceSum hits -> correct
"""
_ATTRIBUTES: Mapping[str, Mapping[str, int]] = {
    "Cast": {"to": 1},
    "ReduceSum": {"keepdims": 0},
    "LogSoftmax": {"axis": -1},
    "GatherElements": {"axis": -1},
    "ArgMax": {"axis": -1, "keepdims": 0},
}


def _nodes(text: str) -> list[object]:
    from onnx import helper

    nodes = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        left, output = line.split(" -> ")
        operator, *inputs = left.split()
        name, _, argument = operator.partition("(")
        attributes: dict[str, object] = dict(_ATTRIBUTES.get(name, {}))
        numbers = [int(n) for n in argument.rstrip(")").split(",") if n]
        if name == "Transpose":
            attributes["perm"] = numbers
        elif name == "Concat":
            attributes["axis"] = numbers[0]
        elif name == "ReduceMean":
            attributes |= {"axes": [2, 3], "keepdims": 0}
        nodes.append(helper.make_node(name, inputs, [output], **attributes))
    return nodes


def _graph(
    folder: Path,
    name: str,
    text: str,
    frozen: Weights,
    inputs: Mapping[str, list[object]],
    outputs: Mapping[str, list[object]],
) -> Graph:
    onnx = pytest.importorskip("onnx", reason="building a package needs onnx")
    integers = {"input_ids", "attention_mask", "position_ids", "past_mask", "labels"}

    def value(name: str, shape: list[object]) -> object:
        return onnx.helper.make_tensor_value_info(name, 7 if name in integers else 1, shape)

    constants = {
        "embedding": frozen.embedding,
        "position": frozen.position,
        "headT": np.ascontiguousarray(frozen.head.T),
        "tenth": np.array(0.1, np.float32),
        "none": np.array(0.0, np.float32),
        **{n: np.array(v) for n, v in {"zero": [0], "one": [1], "two": [2], "last": [-1]}.items()},
        "ends": np.array([2, 3]),
    }
    inputs = {**inputs, "lora_scale": [], BIAS: [len(frozen.head)]}
    used = [c for c in constants if f" {c} " in text.replace("\n", " ")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            _nodes(text),
            name,
            [value(*item) for item in inputs.items()],
            [value(*item) for item in outputs.items()],
            [onnx.numpy_helper.from_array(constants[c], c) for c in used],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    ref = put(folder, model.SerializeToString())
    return Graph(name=name, runtime="onnx", blob=ref, inputs=tuple(inputs), outputs=tuple(outputs))


def _manifest(task: Task, graphs: Sequence[Graph], classes: int, **fields: object) -> Manifest:
    return Manifest(
        model="tiny",
        model_digest=digest_of(b"tiny"),
        architecture="Tiny",
        layer_count=1,
        precision="fp32",
        kept_layers=(0,),
        lowest_trained_layer=1,
        task=task,
        graphs=tuple(graphs),
        adapter=(
            AdapterTensor(
                name=BIAS, role="head", module="head", layer=-1, shape=(classes,), trained=True
            ),
        ),
        weights=(),
        weight_blobs=(),
        probe=None,
        **fields,  # type: ignore[arg-type]
    )


TOKENS: dict[str, list[object]] = {
    "input_ids": ["batch", "step"],
    "attention_mask": ["batch", "step"],
}
LABELS: dict[str, list[object]] = {"labels": ["batch", "step"], "weights": ["batch", "step"]}
LOSS: dict[str, list[object]] = {"loss": [], "correct": []}


def language_package(folder: Path, *, positions: int = POSITIONS) -> tuple[Manifest, Weights]:
    """A language model with a cache; its evaluation graph looks at the last token alone."""
    frozen = weights(len(WORDS))
    cache: list[object] = ["past", "batch", 1, WIDTH]
    decode = _graph(
        folder,
        "decode",
        _DECODE,
        frozen,
        {
            **TOKENS,
            "position_ids": ["batch", "step"],
            "past_mask": ["batch", "past"],
            "past.0.key": cache,
            "past.0.value": cache,
        },
        {
            "logits": ["batch", len(WORDS)],
            "new.0.key": ["step", "batch", 1, WIDTH],
            "new.0.value": ["step", "batch", 1, WIDTH],
        },
    )
    evaluate = _graph(
        folder,
        "evaluate",
        _WORDS + _LOSS,
        frozen,
        {"input_ids": ["batch", "step"], **LABELS},
        LOSS,
    )
    manifest = _manifest(
        Task(kind="causal-language-modeling", labels=()),
        (decode, evaluate),
        len(WORDS),
        tokenizer=put(folder, word_tokenizer()),
        text=TextInput(max_positions=positions, pad_id=PAD, mask_id=MASK, end_ids=(END,)),
        cache=CacheShape(heads=1, width=WIDTH),
    )
    return manifest, frozen


def word_package(folder: Path, labels: tuple[str, ...]) -> tuple[Manifest, Weights]:
    """A class for each token by its embedding."""
    frozen = weights(len(labels))
    logits: list[object] = ["batch", "step", len(labels)]
    features: list[object] = ["batch", "step", WIDTH]
    ids: dict[str, list[object]] = {"input_ids": ["batch", "step"]}
    graphs = (
        _graph(folder, "predict", _WORDS, frozen, ids, {"logits": logits, "features": features}),
        _graph(folder, "evaluate", _WORDS + _LOSS, frozen, {**ids, **LABELS}, LOSS),
    )
    manifest = _manifest(
        Task(kind="token-classification", labels=labels),
        graphs,
        len(labels),
        tokenizer=put(folder, word_tokenizer()),
        text=TextInput(pad_id=PAD),
    )
    return manifest, frozen


def image_package(folder: Path, labels: tuple[str, ...]) -> tuple[Manifest, Weights]:
    """A class by an image's mean colour."""
    frozen = weights(len(labels), width=3)
    logits: list[object] = ["batch", len(labels)]
    features: list[object] = ["batch", 3]
    graph = _graph(
        folder,
        "predict",
        _IMAGES,
        frozen,
        {"pixel_values": ["batch", 3, 4, 4]},
        {"logits": logits, "features": features},
    )
    manifest = _manifest(
        Task(kind="image-classification", labels=labels),
        (graph,),
        len(labels),
        tokenizer=None,
        image=ImageInput(height=4, width=4),
    )
    return manifest, frozen


def local_model(
    folder: Path, manifest: Manifest, tensors: Tensors, inputs: Mapping[str, float] = INPUTS
) -> LocalModel:
    """What a client uses, on a store that holds a package and an adapter.

    Args:
        folder: Where the package was built.
        manifest: Of the package.
        tensors: The adapter.
        inputs: The plan's.
    """
    package = put(folder, dump(manifest))
    values = put(folder, pack(Bundle({name: raw(value) for name, value in tensors.items()})))
    store = Store(folder / "store")
    blobs = (package, values, *manifest.blobs())
    for blob in blobs:
        store.blobs.path(blob.digest).write_bytes((folder / blob.digest).read_bytes())
    store.save_last_adapter(
        LastAdapter(
            run_id="run",
            package=package,
            adapter=values,
            inputs=inputs,
            max_length=16,
            blobs=tuple(blob.digest for blob in blobs),
        )
    )
    store.close()  # gives back the lock, which reading does not need
    return LocalModel(store, engine="onnx", threads=1)
