# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.tiny_tasks import (
    BEGIN,
    BIAS,
    END,
    WORDS,
    Weights,
    adapter,
    language_logits,
    language_package,
    local_model,
    word_package,
    word_tokenizer,
)

from lorikit.proto.manifest import Manifest, TextInput
from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import TextReader
from lorikit.sdk._errors import (
    DataError,
    NonFiniteError,
    PackageError,
    UnsupportedPackageError,
)
from lorikit.sdk._generation import Sampling, Writing, choose, probabilities
from lorikit.sdk._model import LocalModel

LOGITS = np.log(np.array([1, 2, 4, 8, 1], np.float32))  # chances 1, 2, 4, 8, 1 of 16


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1), np.array([1, 2, 4, 8, 1]) / 16),
        (Sampling(temperature=0.5), np.array([1, 4, 16, 64, 1]) / 86),  # squares
        (Sampling(), [0, 0, 0, 1, 0]),
        (Sampling(temperature=1, top_k=2), np.array([0, 0, 4, 8, 0]) / 12),
        (Sampling(temperature=1, top_k=4), np.array([1, 2, 4, 8, 0]) / 15),  # the first of equals
        (Sampling(temperature=1, top_k=9), np.array([1, 2, 4, 8, 1]) / 16),
        (Sampling(temperature=1, top_p=0.5), [0, 0, 0, 1, 0]),  # 8 of 16 reaches it
        (Sampling(temperature=1, top_p=0.51), np.array([0, 0, 4, 8, 0]) / 12),
        (Sampling(temperature=1, top_p=0.76), np.array([0, 2, 4, 8, 0]) / 14),
        (Sampling(temperature=1, top_k=2, top_p=0.7), np.array([0, 0, 4, 8, 0]) / 12),  # 8/12 < 0.7
        (Sampling(temperature=1, top_k=2, top_p=0.6), [0, 0, 0, 1, 0]),
    ],
)
def test_chances_follow_temperature_then_top_k_then_top_p(
    sampling: Sampling, expected: np.ndarray
) -> None:
    np.testing.assert_allclose(probabilities(LOGITS, sampling), expected, rtol=1e-6)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([1e30, -1e30, 1e30], np.float32)
    np.testing.assert_allclose(probabilities(logits, Sampling(temperature=0.1)), [0.5, 0, 0.5])


def test_draws_come_as_often_as_their_chance_says(rng: np.random.Generator) -> None:
    sampling = Sampling(temperature=1, top_k=3)

    drawn = [choose(LOGITS, sampling, rng) for _ in range(4000)]

    for token, share in ((1, 2 / 14), (2, 4 / 14), (3, 8 / 14)):
        deviation = np.sqrt(share * (1 - share) / 4000)
        assert drawn.count(token) / 4000 == pytest.approx(share, abs=3 * deviation)
    assert set(drawn) == {1, 2, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.5}, "top_p must lie above 0 and be at most 1, got 1.5"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"stop": ("",)}, "stop must be texts that are not empty"),
        ({"stop": "end"}, "stop must be texts"),
    ],
)
def test_sampling_is_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def _byte_reader() -> TextReader:
    """A tokeniser of single bytes."""
    tokenizers = pytest.importorskip("tokenizers", reason="reading text needs tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return TextReader(tokenizer.to_str().encode(), TextInput(), 8)


def _written(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Writing]:
    reader = _byte_reader()
    writing = Writing(reader, reader.tokenizer.prompt_ids("ab"), Sampling(stop=stop))
    pieces = []
    for token in reader.tokenizer.prompt_ids(text):
        writing.add(token)
        pieces.append(writing.piece())
        if writing.finish:
            break
    return pieces, writing


def test_character_of_several_tokens_comes_when_it_is_whole() -> None:
    pieces, writing = _written("xé€!")
    assert pieces == ["x", "", "é", "", "", "€", "!"]
    assert writing.result().text == "xé€!"
    assert writing.result().finish == "length"


def test_stop_text_ends_the_writing_and_no_part_of_it_is_given() -> None:
    pieces, writing = _written("one.\n\ntwo", stop=("\n\n", "zzz"))

    assert pieces == ["o", "n", "e", ".", "", ""]
    assert (writing.result().text, writing.finish) == ("one.", "stop")
    assert writing.result().tokens == 6


def test_beginning_of_a_stop_text_is_given_once_it_turns_out_to_be_none() -> None:
    pieces, _ = _written("a\nb", stop=("\n\n",))
    assert pieces == ["a", "", "\nb"]


Language = tuple[LocalModel, Manifest, Weights, Tensors]


@pytest.fixture
def language(tmp_path: Path) -> Language:
    pytest.importorskip("onnxruntime", reason="decodes on the onnx engine")
    manifest, frozen = language_package(tmp_path)
    tensors = adapter(len(WORDS))
    return local_model(tmp_path, manifest, tensors), manifest, frozen, tensors


def _reference(frozen: Weights, tensors: Tensors, prompt: str, count: int) -> list[int]:
    """Greedy continuation that computes everything anew for each token."""
    ids = [BEGIN, *(WORDS.index(word) for word in prompt.split())]
    for _ in range(count):
        ids.append(int(language_logits(frozen, tensors[BIAS], ids).argmax()))
        if ids[-1] == END:
            break
    return ids[1 + len(prompt.split()) :]


def _words(ids: list[int]) -> str:
    return "".join(f" {WORDS[n]}" for n in ids if n > 3)


PROMPTS = ["w1", "w2 w3 w30 w5", "w7 w8", "w9 w1 w2 w3 w4 w5 w6", "w11", "w3 w3"]


def test_cache_gives_what_computing_everything_anew_gives(language: Language) -> None:
    model, _, frozen, tensors = language

    found = model.generate(PROMPTS, Sampling(max_new_tokens=20))

    expected = [_reference(frozen, tensors, prompt, 20) for prompt in PROMPTS]
    assert [each.text for each in found] == [_words(ids) for ids in expected]
    assert [each.tokens for each in found] == [len(ids) for ids in expected]
    assert len({each.text for each in found}) > 3


def test_long_prompt_is_read_in_parts(language: Language) -> None:
    model, _, frozen, tensors = language
    prompt = " ".join(f"w{n * 7 % 36}" for n in range(70))

    (found,) = model.generate([prompt], Sampling(max_new_tokens=5))

    assert found.text == _words(_reference(frozen, tensors, prompt, 5))


def test_pieces_of_a_stream_are_the_generated_text(language: Language) -> None:
    model, *_ = language
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=3)

    pieces = list(model.stream(PROMPTS[1], sampling))

    assert "".join(pieces) == model.generate([PROMPTS[1]], sampling)[0].text
    assert len(pieces) > 3


def test_draws_depend_on_seed_and_prompt_alone(language: Language) -> None:
    model, *_ = language
    sampling = Sampling(max_new_tokens=12, temperature=1.5, seed=1)

    together = model.generate(PROMPTS, sampling)
    again = model.generate(PROMPTS, sampling)
    other = model.generate(PROMPTS, Sampling(max_new_tokens=12, temperature=1.5, seed=2))

    assert together == again
    assert together[0] == model.generate(PROMPTS[:1], sampling)[0]
    assert together != other


def test_end_token_ends_a_text_and_its_neighbours_go_on(language: Language, tmp_path: Path) -> None:
    _, _, frozen, tensors = language
    biased = {BIAS: tensors[BIAS].copy()}
    biased[BIAS][END] += 8
    (tmp_path / "other").mkdir()
    manifest, _ = language_package(tmp_path / "other")
    model = local_model(tmp_path / "other", manifest, biased)

    found = model.generate(PROMPTS[:4], Sampling(max_new_tokens=15))

    expected = [_reference(frozen, biased, prompt, 15) for prompt in PROMPTS[:4]]
    assert [each.text for each in found] == [_words(ids) for ids in expected]
    assert {each.finish for each in found} == {"end", "length"}


def test_text_ends_where_the_model_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="decodes on the onnx engine")
    manifest, _ = language_package(tmp_path, positions=8)
    model = local_model(tmp_path, manifest, adapter(len(WORDS)))

    short, long = model.generate(["w1", "w1 w2 w3 w4 w5"], Sampling(max_new_tokens=30))

    assert (short.tokens, short.finish) == (6, "length")  # of 8 with <s> and w1
    assert (long.tokens, long.finish) == (2, "length")
    with pytest.raises(DataError, match="prompt 0 has 8 tokens, and the model reads 8"):
        model.generate(["w1 w2 w3 w4 w5 w6 w7"], Sampling())


def test_app_may_use_the_model_in_the_middle_of_a_stream(language: Language) -> None:
    model, *_ = language
    sampling = Sampling(max_new_tokens=10)
    whole = model.generate(["w2"], sampling)[0].text

    stream = model.stream("w2", sampling)
    first = next(stream)
    assert model.generate(["w2"], sampling)[0].text == whole
    model.close()

    assert first + "".join(stream) == whole


@pytest.mark.parametrize(
    ("prompt", "message"), [(7, "prompt 1 is of type int"), (None, "prompt 1 is of type NoneType")]
)
def test_bad_prompt_is_named(language: Language, prompt: object, message: str) -> None:
    model, *_ = language
    with pytest.raises(DataError, match=message):
        model.generate(["w1", prompt], Sampling())  # type: ignore[list-item]


def test_numbers_that_overflow_are_noticed(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="decodes on the onnx engine")
    manifest, _ = language_package(tmp_path)
    model = local_model(tmp_path, manifest, adapter(len(WORDS)), {"lora_scale": 3e38})

    with pytest.raises(NonFiniteError, match="logits are not finite"):
        model.generate(["w1"], Sampling())


def test_package_that_cannot_continue_says_what_to_do(language: Language, tmp_path: Path) -> None:
    tensors = language[3]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    bare, _ = language_package(tmp_path / "a")
    bare = dataclasses.replace(bare, graphs=bare.graphs[1:], cache=None)
    words, _ = word_package(tmp_path / "b", ("a", "b"))

    with pytest.raises(UnsupportedPackageError, match="no decoding graph; compile it anew"):
        local_model(tmp_path / "a", bare, tensors).generate(["w1"], Sampling())
    with pytest.raises(PackageError, match="for token-classification; use predict"):
        local_model(tmp_path / "b", words, adapter(2)).generate(["w1"], Sampling())


def test_special_tokens_behind_a_prompt_are_left_out() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="reading text needs tokenizers")
    both = tokenizers.Tokenizer.from_buffer(word_tokenizer())
    both.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    tokenizer = TextReader(both.to_str().encode(), None, 8).tokenizer

    assert tokenizer.prompt_ids("w0 w1") == [BEGIN, 4, 5]
    assert tokenizer.ids("w0 w1") == [BEGIN, 4, 5, END]
