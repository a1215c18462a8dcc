# SPDX-License-Identifier: Apache-2.0
"""A manifest survives its bytes, has one digest, and is checked field by field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.proto.manifest import (
    AdapterTensor,
    BlobRef,
    CacheShape,
    Graph,
    ImageInput,
    Manifest,
    ManifestError,
    Task,
    TextInput,
    WeightTensor,
    digest_of,
    dump,
    is_digest,
    load,
)

WEIGHTS = BlobRef(digest="a" * 64, size=300)
TRAIN = BlobRef(digest="b" * 64, size=200)
PREDICT = BlobRef(digest="c" * 64, size=100)
TOKENIZER = BlobRef(digest="d" * 64, size=100)

MANIFEST = Manifest(
    model="tiny",
    model_digest="e" * 64,
    architecture="BertForSequenceClassification",
    layer_count=2,
    precision="nf4",
    kept_layers=(0, 1),
    lowest_trained_layer=1,
    task=Task(kind="sequence-classification", labels=("ja", "nein", "vielleicht é")),
    graphs=(
        Graph(name="train", runtime="onnx", blob=TRAIN, inputs=("input_ids",), outputs=("loss",)),
        Graph(
            name="predict",
            runtime="onnx",
            blob=PREDICT,
            inputs=(),
            outputs=("logits",),
            minimum_runtime="1.22",
            prepack=True,
        ),
    ),
    adapter=(
        AdapterTensor(
            name="layer.1.query.lora_A.weight",
            role="lora_A",
            module="layer.1.query",
            layer=1,
            shape=("rank", 16),
            trained=True,
        ),
        AdapterTensor(
            name="classifier.bias",
            role="head",
            module="classifier",
            layer=-1,
            shape=(3,),
            trained=False,
        ),
    ),
    weights=(
        WeightTensor(name="embedding", codec="int8", shape=(8, 2), nbytes=48, blob=WEIGHTS.digest),
    ),
    weight_blobs=(WEIGHTS,),
    tokenizer=TOKENIZER,
    probe=None,
    text=TextInput(max_positions=64, pad_id=1, mask_id=4, end_ids=(2, 3)),
    image=ImageInput(height=4, width=6, shortest_edge=8, mean=(0.5,), std=(0.25,)),
    cache=CacheShape(heads=2, width=8),
    facts={"parameters": 22.7e6},
)


def test_load_of_dump_gives_the_same_manifest() -> None:
    assert load(dump(MANIFEST)) == MANIFEST


def test_equal_manifests_have_equal_bytes_whatever_made_them() -> None:
    whole = dataclasses.replace(MANIFEST, facts={"b": 2, "a": 1})
    real = dataclasses.replace(MANIFEST, facts={"a": 1.0, "b": 2.0})

    assert dump(whole) == dump(real) == dump(load(dump(whole)))


def test_bytes_are_canonical_json() -> None:
    data = dump(MANIFEST)

    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()


def test_digest_is_the_sha256_of_the_bytes() -> None:
    assert digest_of(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert is_digest(digest_of(b""))


@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_other_texts_are_no_digests(text: str) -> None:
    assert not is_digest(text)


def test_blobs_come_once_each_and_the_smallest_first() -> None:
    again = dataclasses.replace(MANIFEST, weight_blobs=(WEIGHTS, WEIGHTS), probe=PREDICT)

    assert again.blobs() == (PREDICT, TOKENIZER, TRAIN, WEIGHTS)


def test_runtime_falls_back_to_the_graph_of_stock_onnxruntime() -> None:
    own = dataclasses.replace(MANIFEST.graphs[0], runtime="onnx-training", blob=WEIGHTS)
    manifest = dataclasses.replace(MANIFEST, graphs=(*MANIFEST.graphs, own))

    assert manifest.graph("train", "onnx-training") == own
    assert manifest.graph("train") == MANIFEST.graphs[0]
    assert manifest.graph("predict", "onnx-training") == MANIFEST.graphs[1]
    with pytest.raises(ManifestError, match="no graph 'generate' for 'onnx'"):
        manifest.graph("generate")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JSON manifest"),
        (b"\xff\xfe", "not a JSON manifest"),
        (b"[" * 100_000, "not a JSON manifest"),
        (b'{"format":' + b"9" * 5000 + b"}", "not a JSON manifest"),
        (b"[]", "not a JSON object"),
        (b"{}", "format None is not 1"),
        (b'{"format":2,"shiny":true}', "format 2 is not 1; update the SDK"),
        (b'{"format":"1"}', "format '1' is not 1"),
        (b'{"format":1}', "Manifest: missing fields"),
        (b'{"format":NaN}', "NaN is not a number of a manifest"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        load(data)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: m.pop("probe"), r"missing fields \['probe'\]"),
        (lambda m: m.update(shiny=1), r"unknown \['shiny'\]"),
        (lambda m: m.update(format=True), "format must be a whole number"),
        (lambda m: m.update(layer_count="2"), "layer_count must be a whole number.*'2'"),
        (lambda m: m.update(layer_count=2.0), "layer_count must be a whole number"),
        (lambda m: m.update(lowest_trained_layer=3), r"lowest_trained_layer must lie in 0..2"),
        (lambda m: m.update(kept_layers=[0, 2]), "kept_layers must lie below layer_count 2"),
        (lambda m: m.update(kept_layers="01"), "kept_layers must be a list"),
        (lambda m: m.update(model=None), "model must be a text, got None"),
        (lambda m: m.update(task=[]), "Task must be an object"),
        (lambda m: m["task"].update(labels=[1]), "labels must be a text, got 1"),
        (lambda m: m["task"].pop("kind"), r"Task: missing fields \['kind'\]"),
        (lambda m: m.update(graphs={}), "graphs must be a list"),
        (lambda m: m["graphs"][0].update(blob=None), "BlobRef must be an object"),
        (lambda m: m["graphs"][0]["blob"].update(digest="../x"), "not a SHA-256 digest: '../x'"),
        (lambda m: m["graphs"][0]["blob"].update(size=-1), "size must be a whole number"),
        (lambda m: m["graphs"][0].update(prepack=0), "prepack must be true or false, got 0"),
        (lambda m: m["graphs"][0].update(minimum_runtime=1.2), "minimum_runtime must be a text"),
        (lambda m: m["graphs"][0].update(minimum_runtime="new"), "minimum_runtime must be numbers"),
        (lambda m: m["adapter"][0].update(shape=["r", 4]), "shape must be a whole number"),
        (lambda m: m["adapter"][0].update(shape=[-1]), "shape must be a whole number"),
        (lambda m: m["adapter"][0].update(layer=-2), "layer must be a whole number of at least -1"),
        (lambda m: m["adapter"][0].update(trained=1), "trained must be true or false, got 1"),
        (lambda m: m["weights"][0].update(blob="/etc/passwd"), "'embedding': not a SHA-256"),
        (lambda m: m["weights"][0].update(shape=[2, "rank"]), "shape must be a whole number"),
        (lambda m: m.update(tokenizer="d" * 64), "BlobRef must be an object"),
        (lambda m: m.update(text=[]), "TextInput must be an object"),
        (lambda m: m["text"].update(mask_id=-2), "mask_id must be a whole number of at least -1"),
        (lambda m: m["text"].update(end_ids=2), "end_ids must be a list"),
        (lambda m: m["image"].update(height=0), "an image has pixels, got 0 x 6"),
        (lambda m: m["image"].update(shortest_edge=5), "4 x 6 cannot be cut out"),
        (lambda m: m["image"].update(mean=[0, 0]), "mean and std need 1 or 3 numbers"),
        (lambda m: m["image"].update(std=[0]), "std must be positive"),
        (lambda m: m["cache"].update(heads=0), "a cache has heads and width, got 0, 8"),
        (lambda m: m.update(facts=[]), "facts must be an object"),
        (lambda m: m["facts"].update(flops="many"), r"facts\['flops'\] must be a finite number"),
        (lambda m: m["facts"].update(flops=10**400), r"facts\['flops'\] must be a finite number"),
    ],
)
def test_manifest_that_breaks_a_rule_is_refused_by_field(
    spoil: Callable[[dict[str, Any]], object], reason: str
) -> None:
    fields = json.loads(dump(MANIFEST))
    spoil(fields)

    with pytest.raises(ManifestError, match=reason):
        load(json.dumps(fields).encode())


def test_fact_that_is_not_finite_is_never_written() -> None:
    with pytest.raises(ManifestError, match="facts must be finite"):
        dump(dataclasses.replace(MANIFEST, facts={"loss": math.nan}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(field=st.sampled_from(sorted(json.loads(dump(MANIFEST)))), value=json_values)
def test_any_value_of_any_field_is_a_manifest_or_an_error(field: str, value: object) -> None:
    fields = {**json.loads(dump(MANIFEST)), field: value}

    try:
        manifest = load(json.dumps(fields).encode())
    except ManifestError:
        return
    assert load(dump(manifest)) == manifest


@given(st.binary(max_size=64))
def test_any_bytes_are_refused_with_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        load(data)


def test_package_may_lack_what_its_model_does_not_read() -> None:
    bare = dataclasses.replace(MANIFEST, text=None, image=None, cache=None)

    assert load(dump(bare)) == bare
