# SPDX-License-Identifier: Apache-2.0
"""Rows of words, of masked texts and of texts to continue."""

from __future__ import annotations

import numpy as np
import pytest

from lorikit.proto.manifest import Task, TextInput
from lorikit.sdk._data import CausalTexts, ClassifiedWords, MaskedTexts, TextReader
from lorikit.sdk._errors import DataError, PackageError, PlanRefusedError

tokenizers = pytest.importorskip("tokenizers", reason="reading text needs tokenizers")

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
PAD, BEGIN, END, MASK, UNKNOWN = range(5)
LETTERS = 5
"""Id of the letter a; b is one more, and so on."""


def tokenizer_json(*, around: str = "<s> $A") -> bytes:
    """A tokeniser that makes a token of each letter, so that places can be counted by eye."""
    vocabulary = {token: n for n, token in enumerate(SPECIAL)}
    vocabulary |= {chr(ord("a") + n): LETTERS + n for n in range(26)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    return tokenizer.to_str().encode()


TEXT = TextInput(max_positions=0, pad_id=PAD, mask_id=MASK, end_ids=(END,))


def reader(max_length: int = 8, *, around: str = "<s> $A", text: TextInput = TEXT) -> TextReader:
    return TextReader(tokenizer_json(around=around), text, max_length)


def ids(word: str) -> list[int]:
    return [LETTERS + ord(letter) - ord("a") for letter in word]


WORDS = Task(kind="token-classification", labels=("O", "B-place", "I-place", "B-name", "I-name"))


def words(rows: object, max_length: int = 12) -> ClassifiedWords:
    return ClassifiedWords(rows, WORDS, reader(max_length, around="<s> $A </s>"))  # type: ignore[arg-type]


def test_first_token_of_a_word_carries_its_label() -> None:
    data = words([(["in", "rome", "x"], ["O", "B-place", 4])])

    batch = data.batch([0], 1 / 3)

    np.testing.assert_array_equal(
        batch.inputs["input_ids"], [[BEGIN, *ids("in"), *ids("rome"), *ids("x"), END]]
    )
    np.testing.assert_array_equal(batch.labels, [[0, 0, 0, 1, 0, 0, 0, 4, 0]])
    np.testing.assert_allclose(batch.weights * 3, [[0, 1, 0, 1, 0, 0, 0, 1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(data.counted([0]), [3])


def test_spans_mean_the_same_as_words_with_labels() -> None:
    spans = words([{"text": "in new york.", "label": [(3, 11, "place")]}])
    listed = words([(["in", "new", "york", "."], ["O", "B-place", "I-place", "O"])])

    for name in ("labels", "weights"):
        np.testing.assert_array_equal(
            getattr(spans.batch([0]), name), getattr(listed.batch([0]), name)
        )


def test_spans_may_be_mappings_with_the_full_name_of_the_class() -> None:
    data = words([("ann b", [{"start": 0, "end": 3, "label": "I-name"}])])
    np.testing.assert_array_equal(data.batch([0]).labels, [[0, 4, 0, 0, 0, 0]])


def test_words_of_unequal_texts_are_padded_without_counting() -> None:
    batch = words([(["ab"], [1]), (["a", "b", "c"], [1, 2, 3])]).batch([0, 1], [0.5, 0.125])

    np.testing.assert_array_equal(batch.inputs["input_ids"][0], [BEGIN, *ids("ab"), END, PAD])
    np.testing.assert_array_equal(batch.labels, [[0, 1, 0, 0, 0], [0, 1, 2, 3, 0]])
    np.testing.assert_array_equal(batch.weights, [[0, 0.5, 0, 0, 0], [0, *[0.125] * 3, 0]])


def test_words_beyond_the_length_do_not_count_in_training_and_are_refused_in_prediction() -> None:
    data = words([(["abc", "def", "ghi"], [0, 1, 2])], max_length=6)
    np.testing.assert_array_equal(data.counted([0]), [2])

    with pytest.raises(DataError, match="row 0: 1 of 3 words have no token within the 6"):
        ClassifiedWords.to_predict([["abc", "def", "ghi"]], WORDS, reader(6, around="<s> $A </s>"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((["a", "b"], ["O"]), "row 1 has 2 words, but 1 labels"),
        ((["a", ""], ["O", "O"]), "row 1: words must be a list of texts that are not empty"),
        ((["a"], "O"), "row 1: labels must be a list, one a word"),
        ((["a"], ["thing"]), "row 1: label 'thing' is no class"),
        ((7, ["O"]), "row 1: words must be a list"),
        (("a b", [(0, 9, "name")]), "row 1: span .* does not lie in a text of 3 characters"),
        (("a b", [(0, 1)]), "row 1: a span is"),
        (("a b", "name"), "row 1: spans must be a list"),
        (([], []), "row 1: none of its words has a token"),
        (["a", "b", "c"], "row 1 is neither a mapping nor a pair"),
    ],
)
def test_bad_row_of_words_is_named(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        words([(["a"], ["O"]), row])


def test_spans_need_a_class_for_what_is_outside() -> None:
    task = Task(kind="token-classification", labels=("name",))
    with pytest.raises(DataError, match="spans need a class 'O'"):
        ClassifiedWords([("a", [])], task, reader())


def test_data_of_words_has_no_class_per_example() -> None:
    with pytest.raises(PlanRefusedError, match="this task labels tokens"):
        _ = words([(["a"], [0])]).labels


MASKED = Task(kind="masked-language-modeling", labels=())
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def masked(rows: object, max_length: int = 42, **options: str) -> MaskedTexts:
    return MaskedTexts(rows, MASKED, reader(max_length, around="<s> $A </s>", **options))  # type: ignore[arg-type]


def test_masked_tokens_are_the_labels_and_special_tokens_are_never_masked() -> None:
    data = masked(["abcdefghijklmnopqrst", "ab"])

    batch = data.batch([0, 1], 0.25)

    counted = batch.weights > 0
    np.testing.assert_array_equal(counted.sum(1), [3, 1])  # round(0.15 x 20), and at least 1
    np.testing.assert_array_equal(data.counted([0, 1, 2]), [3, 1, 3])
    whole = np.where(counted, batch.labels, batch.inputs["input_ids"])
    np.testing.assert_array_equal(whole[0], [BEGIN, *ids("abcdefghijklmnopqrst"), END])
    np.testing.assert_array_equal(whole[1, :4], [BEGIN, *ids("ab"), END])
    assert not counted[:, 0].any()
    assert set(batch.weights[counted]) == {0.25}


def test_masks_depend_on_seed_epoch_and_example_alone() -> None:
    data = masked([ALPHABET, ALPHABET, ALPHABET])

    def hidden(draws: list[int], seed: int = 1) -> list[bytes]:
        return [row.tobytes() for row in data.batch(draws, seed=(seed,)).weights]

    assert hidden([0, 1, 2]) == hidden([2, 1, 0])[::-1]
    assert len({*hidden([0, 1, 3]), *hidden([0], seed=2)}) == 4


def test_four_of_five_masked_tokens_are_hidden_one_in_ten_is_another_and_one_in_ten_stays() -> None:
    data = masked([ALPHABET])
    kinds = np.zeros(3)
    for epoch in range(1000):
        batch = data.batch([epoch])
        counted = batch.weights > 0
        seen, label = batch.inputs["input_ids"][counted], batch.labels[counted]
        assert not np.isin(seen, [PAD, BEGIN, END]).any()
        kinds += [(seen == MASK).sum(), (seen == label).sum(), counted.sum()]

    # 4 of 26 each time; 4000 in all; a letter put in stays the same one time in 26; 3 deviations.
    assert kinds[2] == 4000
    assert kinds[0] / 4000 == pytest.approx(0.8, abs=3 * np.sqrt(0.8 * 0.2 / 4000))
    assert kinds[1] / 4000 == pytest.approx(0.1 + 0.1 / 26, abs=3 * np.sqrt(0.1 * 0.9 / 4000))


def test_long_text_to_mask_becomes_several_examples() -> None:
    data = masked([ALPHABET], max_length=12)

    np.testing.assert_array_equal(data.lengths, [12, 12, 8])


def test_model_without_a_mask_token_cannot_be_trained_to_guess() -> None:
    text = TextInput(pad_id=PAD, mask_id=-1)
    with pytest.raises(PackageError, match="no mask token"):
        MaskedTexts(["a"], MASKED, reader(text=text))


def test_text_without_ordinary_tokens_is_named() -> None:
    with pytest.raises(DataError, match="row 1: the text has no tokens that could be masked"):
        masked(["a", ""])


CAUSAL = Task(kind="causal-language-modeling", labels=())


def causal(rows: object, max_length: int = 8, **options: object) -> CausalTexts:
    return CausalTexts(rows, CAUSAL, reader(max_length, **options))  # type: ignore[arg-type]


def test_texts_make_one_stream_that_is_cut_into_examples() -> None:
    data = causal(["abc", {"text": "defgh"}], max_length=5)

    batch = data.batch([0, 1, 2], 0.1)

    stream = [BEGIN, *ids("abc"), END, BEGIN, *ids("defgh"), END]
    rows = batch.inputs["input_ids"]
    np.testing.assert_array_equal(rows, [stream[:5], stream[5:10], [*stream[10:], PAD, PAD, PAD]])
    np.testing.assert_array_equal(batch.labels[0], [*stream[1:5], 0])
    np.testing.assert_array_equal(
        batch.weights > 0, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(data.counted([0, 1, 2]), [4, 4, 1])


def test_response_alone_counts_up_to_its_end_token() -> None:
    data = causal([{"prompt": "ab", "response": "cd"}])

    batch = data.batch([0], 1 / 3)

    np.testing.assert_array_equal(batch.inputs["input_ids"], [[BEGIN, *ids("abcd"), END]])
    np.testing.assert_array_equal(batch.labels, [[0, 0, *ids("cd"), END, 0]])
    np.testing.assert_allclose(batch.weights * 3, [[0, 0, 1, 1, 1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(data.counted([0]), [3])


def test_end_token_of_the_tokeniser_is_not_doubled() -> None:
    pairs = causal([{"prompt": "ab", "response": "cd"}], around="<s> $A </s>")
    texts = causal(["abcd"], around="<s> $A </s>")

    for data in (pairs, texts):
        np.testing.assert_array_equal(
            data.batch([0]).inputs["input_ids"], [[BEGIN, *ids("abcd"), END]]
        )


@pytest.mark.parametrize(
    ("prompt", "response", "kept", "first"),
    [
        ("abcdefgh", "xy", "fgh|xy", 3),  # of 7, <s>, the response and </s> leave 3
        ("abcdefgh", "opqrstuvwxyz", "h|opqrs", 1),
        ("a", "opqrstuvwxyz", "a|opqrs", 1),
    ],
)
def test_prompt_loses_its_beginning_and_then_the_response_its_end(
    prompt: str, response: str, kept: str, first: int
) -> None:
    batch = causal([{"prompt": prompt, "response": response}], max_length=7).batch([0])

    before, after = kept.split("|")
    expected = [BEGIN, *ids(before), *ids(after), END][:7]
    np.testing.assert_array_equal(batch.inputs["input_ids"], [expected])
    assert np.flatnonzero(batch.weights[0])[0] == first


def test_weights_of_a_step_sum_to_one_over_its_counted_tokens() -> None:
    data = causal([{"prompt": "ab", "response": r} for r in ("c", "cdefg", "xyz")])
    draws = np.array([0, 1, 2])

    weight = 1 / data.counted(draws).sum()
    parts = [data.batch(group, weight).weights.sum() for group in data.grouped(draws, 2)]

    assert sum(parts) == pytest.approx(1)
    assert data.counted(draws).sum() == 2 + 6 + 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": ""}, "row 1: the response '' has no tokens"),
        ({"prompt": 3, "response": "b"}, "row 1: the prompt is of type int"),
        ({"prompt": "a"}, "row 1 has no column 'text'"),
        (3, "row 1 is neither a mapping with column 'text' nor a text"),
    ],
)
def test_bad_row_of_a_language_model_is_named(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        causal(["abc", row])


def test_long_text_is_read_in_parts_without_a_token_lost_or_added() -> None:
    text = "abcde fghij " * 20_000

    data = causal([text], max_length=1024)

    batch = data.batch(range(len(data)))
    found = batch.inputs["input_ids"][batch.inputs["attention_mask"] == 1]
    np.testing.assert_array_equal(found, [BEGIN, *ids("abcdefghij") * 20_000, END])
