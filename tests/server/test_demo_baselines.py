# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from lorikit.server.demo.baseline_task import BaselineTask
from lorikit.server.demo.baselines import (
    EncoderClassifier,
    LabelledTexts,
    centralised_baseline,
    linear_probe,
    read_rows,
)

OWN_NOISE = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
"""peft warns of its own use of transformers."""


def make_task(**changes: object) -> BaselineTask:
    fields = {
        "model": "m",
        "train": "train.jsonl",
        "test": "test.jsonl",
        "text_column": "text",
        "label_column": "intent",
        "labels": ("left", "right"),
        "targets": ("query",),
        "rank": 4,
        "scale": 2.0,
        "learning_rate": 1e-3,
        "batch_size": 8,
        "max_length": 16,
        "examples": 64,
        "head_start": None,
        "seconds": 1.0,
        "seed": 0,
    }
    return BaselineTask(**{**fields, **changes})


def test_probe_separates_what_a_line_separates(rng: np.random.Generator):
    classes = np.arange(300) % 3
    centres = np.array([[0, 0, 8], [8, 0, 0], [0, 8, 0]], np.float32)
    features = (centres[classes] + rng.normal(size=(300, 3))).astype(np.float32)

    weights, bias = linear_probe(features, classes, class_count=3)

    assert (weights.shape, bias.shape) == ((3, 3), (3,))
    assert ((features @ weights.T + bias).argmax(axis=1) == classes).mean() > 0.99


def test_probe_does_not_depend_on_the_features_units(rng: np.random.Generator):
    classes = np.arange(200) % 2
    features = (classes[:, None] + rng.normal(size=(200, 4))).astype(np.float32)
    units = np.array([1, 10, 0.1, 3], np.float32)

    weights, bias = linear_probe(features, classes, class_count=2)
    scaled, other = linear_probe(features * units + 5, classes, class_count=2)

    first = features @ weights.T + bias
    second = (features * units + 5) @ scaled.T + other
    assert np.abs(first - second).max() < 0.05  # both fits stop within L-BFGS's tolerance


def test_rows_become_texts_and_class_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "intent": "right"}, {"text": "b", "intent": "left"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")

    data = read_rows(str(path), make_task())

    assert data.texts == ("a", "b")
    assert data.classes.tolist() == [1, 0]


def test_row_of_an_unknown_class_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "intent": "up"}\n')

    with pytest.raises(KeyError, match="up"):
        read_rows(str(path), make_task())


@pytest.mark.filterwarnings(OWN_NOISE)
def test_lora_in_one_place_trains_the_usual_modules_where_a_run_names_none(tiny_model):
    rows = LabelledTexts(("play music", "call mum") * 32, np.arange(64) % 2)
    task = make_task(model=str(tiny_model), targets=(), seconds=60.0)
    encoder = EncoderClassifier(task)

    result = centralised_baseline(task, encoder, encoder.features(rows.texts), rows, rows)

    trained = {
        name.split(".lora_A")[0] for name, _ in encoder.model.named_parameters() if "lora_A" in name
    }
    assert {name.rpartition(".")[2] for name in trained} == {"query", "value"}
    assert (result["examples"], result["is_complete"]) == (64, True)
