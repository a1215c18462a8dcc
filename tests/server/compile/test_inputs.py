# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.server.compile.tiny_llama import write_tiny_llama

from lorikit.proto.manifest import ImageInput, Task, TextInput
from lorikit.server.compile.inputs import image_input, text_input
from lorikit.server.compile.insertion import AdapterConfig
from lorikit.server.compile.models import Model, load_model
from lorikit.server.errors import UnsupportedModelError

CAUSAL = Task(kind="causal-language-modeling", labels=())


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path)


def _load(folder: Path, **options: object) -> Model:
    return load_model(folder, CAUSAL, AdapterConfig(**options))  # type: ignore[arg-type]


def test_language_model_names_its_end_and_its_length(llama: Path) -> None:
    found = text_input(llama, _load(llama, targets=("q_proj",)))

    assert found == TextInput(max_positions=48, pad_id=0, mask_id=-1, end_ids=(2,))


def test_generation_may_end_in_several_ways(llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))

    found = text_input(llama, _load(llama, targets=("q_proj",)))

    assert found is not None
    assert found.end_ids == (7, 2)


def test_soft_prompt_takes_its_part_of_the_length(llama: Path) -> None:
    found = text_input(llama, _load(llama, kind="prompt", size=5))

    assert found is not None
    assert found.max_positions == 43


def test_special_tokens_come_from_model_and_tokeniser(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"] = [{"content": "<hide>", "id": 70}, {"content": "<fill>", "id": 71}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"mask_token": {"content": "<hide>"}, "pad_token": "<fill>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    kind = SimpleNamespace(inputs=("input_ids",))

    def read(**config: object) -> TextInput:
        fields = {"model_type": "bert", "max_position_embeddings": 66, **config}
        model = SimpleNamespace(kind=kind, config=SimpleNamespace(**fields), prompt_tokens=0)
        found = text_input(tmp_path, model)  # type: ignore[arg-type]  # only these fields are read
        assert found is not None
        return found

    assert read() == TextInput(max_positions=66, pad_id=71, mask_id=70)
    assert read(pad_token_id=1).pad_id == 1
    assert read(model_type="roberta", pad_token_id=1).max_positions == 64


MOBILE_NET = {
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _image(folder: Path, fields: dict[str, object] | None, **config: object) -> ImageInput | None:
    if fields is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    model = SimpleNamespace(
        kind=SimpleNamespace(inputs=("pixel_values",)),
        config=SimpleNamespace(**{"image_size": 224, "num_channels": 3, **config}),
    )
    return image_input(folder, model)  # type: ignore[arg-type]  # only these fields are read


def test_image_is_resized_cut_and_scaled_as_the_folder_says(tmp_path: Path) -> None:
    assert _image(tmp_path, MOBILE_NET) == ImageInput(
        height=224,
        width=224,
        shortest_edge=256,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def test_image_without_a_cut_is_resized_whole(tmp_path: Path) -> None:
    fields = {"size": {"height": 16, "width": 24}, "do_normalize": False}

    found = _image(tmp_path, fields, image_size=[16, 24], num_channels=1)

    assert found == ImageInput(height=16, width=24, mean=(0.0,), std=(1.0,))


def test_folder_without_a_preprocessor_gets_the_usual_numbers(tmp_path: Path) -> None:
    assert _image(tmp_path, None) == ImageInput(height=224, width=224)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_rescale": False}, "do_rescale false"),
        ({**MOBILE_NET, "size": {"shortest_edge": 100}}, "cannot be cut out"),
        ({"image_std": [0, 0, 0]}, "std must be positive"),
    ],
)
def test_other_preprocessing_is_refused(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        _image(tmp_path, fields)
