# SPDX-License-Identifier: Apache-2.0
"""What an app gets from the newest adapter, for every kind of task; see also ``test_client``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.sdk.tiny_tasks import (
    BEGIN,
    BIAS,
    END,
    INPUTS,
    WORDS,
    adapter,
    image_package,
    language_package,
    local_model,
    word_package,
)

from lorikit.sdk._errors import DataError, PackageError

pytest.importorskip("onnxruntime", reason="predicts on the onnx engine")

CLASSES = ("O", "place", "name")


def _chances(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits - logits.max(-1, keepdims=True))
    result: np.ndarray = values / values.sum(-1, keepdims=True)
    return result


def test_each_word_gets_a_label(tmp_path: Path) -> None:
    manifest, frozen = word_package(tmp_path, CLASSES)
    tensors = adapter(len(CLASSES))
    model = local_model(tmp_path, manifest, tensors)
    texts = [["w3", "w1"], ["w2"], ["w5", "w5", "w0", "w9"]]

    found = model.predict(texts)

    for words, predictions in zip(texts, found, strict=True):
        ids = [WORDS.index(word) for word in words]
        logits = INPUTS["lora_scale"] * frozen.embedding[ids] @ frozen.head.T + tensors[BIAS]
        labels, chances = zip(*predictions, strict=True)
        assert labels == tuple(CLASSES[n] for n in logits.argmax(1))
        np.testing.assert_allclose(chances, _chances(logits).max(1), rtol=1e-5)


def test_words_are_evaluated_over_all_words(tmp_path: Path) -> None:
    manifest, frozen = word_package(tmp_path, CLASSES)
    tensors = adapter(len(CLASSES))
    rows = [(["w3", "w1", "w8"], ["O", "place", "name"]), (["w2"], [0])]

    metrics = local_model(tmp_path, manifest, tensors).evaluate(rows)

    ids = [WORDS.index(word) for word in ("w3", "w1", "w8", "w2")]
    labels = np.array([0, 1, 2, 0])
    chances = _chances(INPUTS["lora_scale"] * frozen.embedding[ids] @ frozen.head.T + tensors[BIAS])
    assert metrics == {
        "accuracy": (chances.argmax(1) == labels).mean(),
        "loss": pytest.approx(-np.log(chances[np.arange(4), labels]).mean(), rel=1e-5),
        "examples": 2.0,
    }


def test_images_get_a_label(tmp_path: Path) -> None:
    manifest, frozen = image_package(tmp_path, ("cat", "dog"))
    tensors = adapter(2)
    model = local_model(tmp_path, manifest, tensors)
    images = [np.full((8, 6, 3), value, np.uint8) for value in (0, 100, 255)]

    found = model.predict(images)

    colours = np.array([0, 100, 255])[:, None].repeat(3, 1) / 255 * 2 - 1
    chances = _chances(INPUTS["lora_scale"] * colours @ frozen.head.T + tensors[BIAS])
    assert [p.label for p in found] == [("cat", "dog")[c] for c in chances.argmax(1)]
    np.testing.assert_allclose([p.probability for p in found], chances.max(1), rtol=1e-5)


def test_language_model_is_measured_by_its_perplexity(tmp_path: Path) -> None:
    manifest, frozen = language_package(tmp_path)
    tensors = adapter(len(WORDS))

    metrics = local_model(tmp_path, manifest, tensors).evaluate(["w4 w5 w6"])

    ids = [BEGIN, *(WORDS.index(word) for word in ("w4", "w5", "w6")), END]
    chances = _chances(
        INPUTS["lora_scale"] * frozen.embedding[ids[:-1]] @ frozen.head.T + tensors[BIAS]
    )
    loss = -np.log(chances[np.arange(4), ids[1:]]).mean()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert metrics["accuracy"] == (chances.argmax(1) == ids[1:]).mean()
    assert metrics["examples"] == 1


def test_nothing_gives_nothing(tmp_path: Path) -> None:
    manifest, _ = word_package(tmp_path, CLASSES)
    model = local_model(tmp_path, manifest, adapter(len(CLASSES)))

    assert model.predict([]) == []
    assert model.evaluate([]) == {"examples": 0.0}


def test_examples_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    for name in ("words", "images", "language"):
        (tmp_path / name).mkdir()
    words, _ = word_package(tmp_path / "words", CLASSES)
    images, _ = image_package(tmp_path / "images", ("cat", "dog"))
    language, _ = language_package(tmp_path / "language")

    with pytest.raises(DataError, match=r"example 1: .* for example text\.split\(\), got 'a b'"):
        local_model(tmp_path / "words", words, adapter(3)).predict([["w1"], "a b"])
    with pytest.raises(DataError, match="give a list of texts, not one text: 'w1 w2'"):
        local_model(tmp_path / "words", words, adapter(3)).predict("w1 w2")
    with pytest.raises(DataError, match="rows are one text, 'w1 w2'; give a list of texts"):
        local_model(tmp_path / "language", language, adapter(len(WORDS))).evaluate("w1 w2")
    with pytest.raises(DataError, match="row 0: the image is of type int"):
        local_model(tmp_path / "images", images, adapter(2)).predict([3])
    with pytest.raises(PackageError, match=r"no classes to predict; use generate\(\)"):
        local_model(tmp_path / "language", language, adapter(len(WORDS))).predict(["w1"])
