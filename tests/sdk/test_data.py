# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import LABELS, tokenizer_json

from lorikit.proto.manifest import Task, TextInput
from lorikit.sdk._data import ClassifiedTexts, TextReader
from lorikit.sdk._errors import DataError, PackageError

TASK = Task(kind="sequence-classification", labels=LABELS)


def _dataset(rows: object, max_length: int = 8, **options: int) -> ClassifiedTexts:
    reader = TextReader(tokenizer_json(), None, max_length, **options)
    return ClassifiedTexts(rows, TASK, reader)  # type: ignore[arg-type]


def test_mappings_and_pairs_and_labels_by_name_and_number_mean_the_same() -> None:
    as_mappings = _dataset([{"text": "w1 w2", "label": "book"}, {"text": "w3", "label": 2}])
    as_pairs = _dataset([("w1 w2", np.int64(1)), ("w3", "cancel")])

    for data in (as_mappings, as_pairs):
        np.testing.assert_array_equal(data.labels, [1, 2])
        batch = data.batch([0, 1])
        np.testing.assert_array_equal(batch.inputs["input_ids"], [[3, 4], [5, 0]])
        np.testing.assert_array_equal(batch.inputs["attention_mask"], [[1, 1], [1, 0]])


def test_rows_may_come_from_a_generator() -> None:
    assert len(_dataset(("w1", n % 3) for n in range(5))) == 5


def test_task_names_the_columns() -> None:
    task = Task(kind="sequence-classification", labels=LABELS, text_column="q", label_column="y")
    reader = TextReader(tokenizer_json(), None, 4)
    data = ClassifiedTexts([{"q": "w0", "y": "ask", "note": None}], task, reader)
    np.testing.assert_array_equal(data.labels, [0])


def test_long_texts_are_cut() -> None:
    data = _dataset([("w1 w2 w3 w4", 0), ("w1", 0)], max_length=3)
    np.testing.assert_array_equal(data.lengths, [3, 1])
    np.testing.assert_array_equal(data.batch([0]).inputs["input_ids"], [[3, 4, 5]])


def test_batches_are_padded_to_the_multiple() -> None:
    batch = _dataset([("w1 w2 w3", 0)], pad_multiple=8).batch([0])
    assert batch.inputs["input_ids"].shape == (1, 8)
    assert batch.inputs["attention_mask"].sum() == 3


def test_batches_hold_each_example_once_the_longest_first() -> None:
    words = [3, 1, 4, 1, 5, 2, 6]
    data = _dataset([(" ".join(["w1"] * n), 0) for n in words])

    groups = list(data.batches(3))

    assert sorted(np.concatenate([indices for indices, _ in groups])) == list(range(7))
    assert [batch.inputs["input_ids"].shape for _, batch in groups] == [(3, 6), (3, 3), (1, 1)]
    assert sum(float(batch.weights.sum()) for _, batch in groups) == pytest.approx(1)


def test_tokens_take_two_bytes_each() -> None:
    data = _dataset([("w1 w2 w3 w4", 0)] * 10)
    assert data._tokens.ids.nbytes == 10 * 4 * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w1"}, "row 1 has no column 'label'"),
        ({"label": 0}, "row 1 has no column 'text'"),
        (("w1", "fly"), "row 1: label 'fly' is no class"),
        (("w1", 3), "row 1: label 3 is no class"),
        (("w1", -1), "row 1: label -1 is no class"),
        (("w1", True), "row 1: label True is no class"),
        (("w1", None), "row 1: label None is no class"),
        ((7, 0), "row 1: the text is of type int"),
        (("", 0), "row 1: the text '' has no tokens"),
        ("w1", "row 1 is neither a mapping nor a pair"),
    ],
)
def test_bad_row_is_named(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _dataset([("w1", 0), row])


def test_broken_tokeniser_is_an_error_of_the_package() -> None:
    with pytest.raises(PackageError, match=r"not a tokenizer\.json"):
        TextReader(b"{}", None, 8)


def test_texts_to_predict_need_no_labels() -> None:
    reader = TextReader(tokenizer_json(), None, 8)
    data = ClassifiedTexts.to_predict(["w1", "w2 w3"], TASK, reader)
    np.testing.assert_array_equal(data.lengths, [1, 2])


def test_example_comes_again_in_every_epoch() -> None:
    data = _dataset([("w1", 0), ("w2", 1), ("w3", 2)])

    first, later = data.batch([1]), data.batch([1 + 3 * 7])

    np.testing.assert_array_equal(first.inputs["input_ids"], later.inputs["input_ids"])
    np.testing.assert_array_equal(data.counted([1, 4, 22]), [1, 1, 1])
    assert [group.tolist() for group in data.grouped([4, 2, 22], 2)] == [[4, 2], [22]]


def test_model_bounds_the_length_and_names_the_padding() -> None:
    text = TextInput(max_positions=3, pad_id=49)
    data = ClassifiedTexts(
        [("w1 w2 w3 w4", 0), ("w1", 0)], TASK, TextReader(tokenizer_json(), text, 8)
    )

    batch = data.batch([0, 1])

    assert data.max_length == 3
    np.testing.assert_array_equal(batch.inputs["input_ids"], [[3, 4, 5], [3, 49, 49]])
    np.testing.assert_array_equal(batch.inputs["attention_mask"], [[1, 1, 1], [1, 0, 0]])
