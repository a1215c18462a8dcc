# SPDX-License-Identifier: Apache-2.0
"""A real package of a few nodes: mean of embeddings, a frozen layer with LoRA, a linear head.

Forward and gradient graph are written out node by node with ``onnx.helper``; weights lie in a blob
named by its digest, as external data. ``reference`` is the same arithmetic in float64 numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from lorikit.proto.manifest import (
    AdapterTensor,
    BlobRef,
    Graph,
    Manifest,
    Task,
    digest_of,
)
from lorikit.proto.tensors import Bundle, Tensors, pack, raw
from lorikit.sdk.engines.base import Batch, Gradients

VOCABULARY, WIDTH, HIDDEN, CLASSES = 50, 12, 7, 3
LABELS = ("ask", "book", "cancel")

A, B = "layer.dense.lora_A.weight", "layer.dense.lora_B.weight"
HEAD, BIAS = "classifier.weight", "classifier.bias"
INPUTS = {"lora_scale": 2.0}

ADAPTER = (
    AdapterTensor(name=A, role="lora_A", module="layer.dense", layer=0,
                  shape=("rank", WIDTH), trained=True),
    AdapterTensor(name=B, role="lora_B", module="layer.dense", layer=0,
                  shape=(HIDDEN, "rank"), trained=True),
    AdapterTensor(name=HEAD, role="head", module="classifier", layer=-1,
                  shape=(CLASSES, HIDDEN), trained=True),
    AdapterTensor(name=BIAS, role="head", module="classifier", layer=-1,
                  shape=(CLASSES,), trained=True),
)  # fmt: skip


@dataclass(frozen=True)
class TinyPackage:
    folder: Path
    manifest: Manifest
    embedding: np.ndarray
    weight: np.ndarray

    def adapter(self, rank: int = 4, seed: int = 1) -> Tensors:
        rng = np.random.default_rng(seed)
        shapes = {A: (rank, WIDTH), B: (HIDDEN, rank), HEAD: (CLASSES, HIDDEN), BIAS: (CLASSES,)}
        return {
            name: rng.standard_normal(shape).astype(np.float32) * np.float32(0.3)
            for name, shape in shapes.items()
        }

    def batch(self, lengths: tuple[int, ...] = (5, 3), seed: int = 2) -> Batch:
        rng = np.random.default_rng(seed)
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        return Batch(
            inputs={
                "input_ids": rng.integers(0, VOCABULARY, mask.shape) * mask,
                "attention_mask": mask,
            },
            labels=rng.integers(0, CLASSES, len(lengths)),
            weights=np.full(len(lengths), 1 / len(lengths), np.float32),
        )

    def reference(self, adapter: Tensors, batch: Batch, scale: float = 2.0) -> Gradients:
        """Loss and gradients by the chain rule, in float64."""
        a, b, head, bias = (adapter[n].astype(np.float64) for n in (A, B, HEAD, BIAS))
        mask = batch.inputs["attention_mask"][:, :, None].astype(np.float64)
        x = (self.embedding.astype(np.float64)[batch.inputs["input_ids"]] * mask).sum(1) / mask.sum(
            1
        )
        down = x @ a.T
        features = x @ self.weight.T.astype(np.float64) + scale * down @ b.T
        logits = features @ head.T + bias
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probability = shifted / shifted.sum(1, keepdims=True)
        rows = np.arange(len(batch.labels))
        loss = -(batch.weights * np.log(probability[rows, batch.labels])).sum()
        d_logits = probability.copy()
        d_logits[rows, batch.labels] -= 1
        d_logits *= batch.weights[:, None]
        d_features = d_logits @ head
        gradients = {
            HEAD: d_logits.T @ features,
            BIAS: d_logits.sum(0),
            B: scale * d_features.T @ down,
            A: scale * (d_features @ b).T @ x,
        }
        return Gradients(
            float(loss),
            float((logits.argmax(1) == batch.labels).sum()),
            {name: value.astype(np.float32) for name, value in gradients.items()},
        )

    def features(self, adapter: Tensors, batch: Batch, scale: float = 2.0) -> np.ndarray:
        mask = batch.inputs["attention_mask"][:, :, None]
        x = (self.embedding[batch.inputs["input_ids"]] * mask).sum(1) / mask.sum(1)
        return x @ self.weight.T + scale * (x @ adapter[A].T) @ adapter[B].T

    def with_probe(self, *, error: float = 0.0) -> TinyPackage:
        """The same package with a probe; ``error`` spoils the expected gradient of B."""
        adapter, batch = self.adapter(rank=2, seed=5), self.batch((4, 2), seed=6)
        expected = self.reference(adapter, batch)
        gradients = {**expected.gradients, B: expected.gradients[B] * np.float32(1 + error)}
        bundle = Bundle(
            {
                **{f"adapter.{name}": raw(value) for name, value in adapter.items()},
                **{f"expected.{name}.grad": raw(value) for name, value in gradients.items()},
                **{f"batch.{name}": raw(value) for name, value in batch.inputs.items()},
                "batch.labels": raw(batch.labels),
                "batch.weights": raw(batch.weights),
            },
            {"expected.loss": expected.loss, "input.lora_scale": 2.0},
        )
        probe = put(self.folder, pack(bundle))
        return replace(self, manifest=replace(self.manifest, probe=probe))


def put(folder: Path, data: bytes) -> BlobRef:
    ref = BlobRef(digest=digest_of(data), size=len(data))
    (folder / ref.digest).write_bytes(data)
    return ref


def build_tiny_package(
    folder: Path, *, seed: int = 0, graphs: tuple[str, ...] = ("train", "predict")
) -> TinyPackage:
    pytest.importorskip("onnx", reason="building a package needs onnx")
    rng = np.random.default_rng(seed)
    embedding = rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    weight = rng.standard_normal((HIDDEN, WIDTH)).astype(np.float32)
    padding = b"\0" * (-embedding.nbytes % 4096)
    blob = put(folder, embedding.tobytes() + padding + weight.tobytes())
    offsets = (0, embedding.nbytes + len(padding))
    tokenizer = put(folder, tokenizer_json())
    manifest = Manifest(
        model="tiny",
        model_digest=blob.digest,
        architecture="TinyForSequenceClassification",
        layer_count=1,
        precision="fp32",
        kept_layers=(0,),
        lowest_trained_layer=0,
        task=Task(kind="sequence-classification", labels=LABELS),
        graphs=tuple(_graph(folder, name, blob.digest, offsets) for name in graphs),
        adapter=ADAPTER,
        weights=(),
        weight_blobs=(blob,),
        tokenizer=tokenizer,
        probe=None,
    )
    return TinyPackage(folder, manifest, embedding, weight)


def tokenizer_json() -> bytes:
    """A word-level tokeniser over w0 ... w47, with [PAD] and [UNK]."""
    tokenizers = pytest.importorskip("tokenizers", reason="reading text needs tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{n}": n + 2 for n in range(VOCABULARY - 2)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


def example_rows(count: int, seed: int = 3) -> list[dict[str, str]]:
    """Texts of 1 to 9 words whose class shows in their words."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = number % CLASSES
        words = rng.integers(0, 16, rng.integers(1, 10)) + 16 * label
        rows.append({"text": " ".join(f"w{w}" for w in words), "label": LABELS[label]})
    return rows


_FORWARD = """
    gather embedding input_ids -> e
    mul e mask -> em
    sum1 em -> x0
    div x0 count -> x
    matmul x wT -> base
    matmul x aT -> down
    matmul down bT -> up
    mul up lora_scale -> scaled
    add base scaled -> features
    matmul features hT -> z
    add z classifier.bias -> logits
"""
_LOSS = """
    logsoftmax logits -> logp
    onehot labels -> target
    mul logp target -> picked
    neg picked -> n1
    mul n1 w -> n2
    sumall n2 -> loss
    argmax logits -> best
    equal best labels -> hits
    castf hits -> hitsf
    sumall hitsf -> correct
"""
_BACKWARD = """
    softmax logits -> p
    sub p target -> d0
    mul d0 w -> d
    t d -> dT
    matmul dT features -> classifier.weight.grad
    sum0 d -> classifier.bias.grad
    matmul d classifier.weight -> df
    mul df lora_scale -> dfs
    t dfs -> dfsT
    matmul dfsT down -> layer.dense.lora_B.weight.grad
    matmul dfs layer.dense.lora_B.weight -> dd
    t dd -> ddT
    matmul ddT x -> layer.dense.lora_A.weight.grad
"""
_OPERATORS = {
    "gather": ("Gather", {}), "mul": ("Mul", {}), "div": ("Div", {}), "add": ("Add", {}),
    "sub": ("Sub", {}), "neg": ("Neg", {}), "matmul": ("MatMul", {}), "equal": ("Equal", {}),
    "t": ("Transpose", {"perm": [1, 0]}), "softmax": ("Softmax", {"axis": 1}),
    "logsoftmax": ("LogSoftmax", {"axis": 1}), "castf": ("Cast", {"to": 1}),
    "argmax": ("ArgMax", {"axis": 1, "keepdims": 0}),
}  # fmt: skip


def _graph(folder: Path, name: str, blob: str, offsets: tuple[int, int]) -> Graph:
    from onnx import TensorProto, checker, helper

    make = helper.make_node
    nodes = [
        make("Cast", ["attention_mask"], ["maskf"], to=1),
        make("Unsqueeze", ["maskf", "axis2"], ["mask"]),
        make("ReduceSum", ["maskf", "axis1"], ["count"], keepdims=1),
        make("Transpose", ["weight"], ["wT"], perm=[1, 0]),
        make("Transpose", [A], ["aT"], perm=[1, 0]),
        make("Transpose", [B], ["bT"], perm=[1, 0]),
        make("Transpose", [HEAD], ["hT"], perm=[1, 0]),
    ]
    text = _FORWARD
    inputs = {"input_ids": ["b", "n"], "attention_mask": ["b", "n"]}
    outputs = {"logits": ["b", CLASSES], "features": ["b", HIDDEN]}
    if name != "predict":
        nodes.append(make("Unsqueeze", ["weights", "axis1"], ["w"]))
        text += _LOSS
        inputs |= {"labels": ["b"], "weights": ["b"]}
        outputs = {"loss": [], "correct": []}
    if name == "train":
        text += _BACKWARD
        outputs |= {t.name + ".grad": list(t.shape) for t in ADAPTER}
    for line in text.split("\n"):
        if line.strip():
            left, right = line.strip().split(" -> ")
            nodes.append(_node(make, left.split(), right))
    inputs |= {"lora_scale": [], **{t.name: list(t.shape) for t in ADAPTER}}
    integers = ("input_ids", "attention_mask", "labels")

    def value(name: str, shape: list) -> object:
        return helper.make_tensor_value_info(name, 7 if name in integers else 1, shape)

    graph = helper.make_graph(
        nodes,
        name,
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
        [
            _external("embedding", (VOCABULARY, WIDTH), blob, offsets[0]),
            _external("weight", (HIDDEN, WIDTH), blob, offsets[1]),
            helper.make_tensor("axis0", TensorProto.INT64, [1], [0]),
            helper.make_tensor("axis1", TensorProto.INT64, [1], [1]),
            helper.make_tensor("axis2", TensorProto.INT64, [1], [2]),
            helper.make_tensor("off_on", TensorProto.FLOAT, [2], [0.0, 1.0]),
            helper.make_tensor("classes", TensorProto.INT64, [], [CLASSES]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ref = put(folder, model.SerializeToString())
    checker.check_model(str(folder / ref.digest))
    return Graph(name=name, runtime="onnx", blob=ref, inputs=tuple(inputs), outputs=tuple(outputs))


def _node(make, words: list[str], output: str):
    operator, *operands = words
    if operator in ("sum0", "sum1"):
        return make("ReduceSum", [*operands, f"axis{operator[-1]}"], [output], keepdims=0)
    if operator == "sumall":
        return make("ReduceSum", operands, [output], keepdims=0)
    if operator == "onehot":
        return make("OneHot", [*operands, "classes", "off_on"], [output])
    kind, attributes = _OPERATORS[operator]
    return make(kind, operands, [output], **attributes)


def _external(name: str, shape: tuple[int, ...], blob: str, offset: int):
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    length = 4 * int(np.prod(shape))
    for key, value in (("location", blob), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
