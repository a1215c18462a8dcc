# SPDX-License-Identifier: Apache-2.0
"""What a device must know to turn rows into a model's inputs, read from the model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorikit.proto.manifest import ImageInput, ManifestError, TextInput
from lorikit.server.compile.models import Model
from lorikit.server.errors import UnsupportedModelError

_PADDED_POSITIONS = ("camembert", "roberta", "xlm-roberta")
"""Architectures whose first positions are taken by the padding token."""

_MASK_TOKENS = ("[MASK]", "<mask>")


def text_input(folder: Path, model: Model) -> TextInput | None:
    """Special tokens and length of a model that reads tokens; None for others.

    The padding token is the model's own where it names one, since some models count positions by
    it; then the tokeniser's, then 0, which the mask hides as well as any other.
    """
    if "input_ids" not in model.kind.inputs:
        return None
    names = _read(folder / "tokenizer_config.json")
    ids = _token_ids(_read(folder / "tokenizer.json"))
    mask = next((ids[t] for t in (_name(names, "mask_token"), *_MASK_TOKENS) if t in ids), -1)
    pad = getattr(model.config, "pad_token_id", None)
    return TextInput(
        max_positions=_positions(model),
        pad_id=ids.get(_name(names, "pad_token"), 0) if pad is None or pad < 0 else int(pad),
        mask_id=mask,
        end_ids=_end_ids(folder, model),
    )


def image_input(folder: Path, model: Model) -> ImageInput | None:
    """Size and scale of a model that reads images; None for others.

    Raises:
        UnsupportedModelError: ``preprocessor_config.json`` asks for something else than resizing,
            cutting out the centre, and scaling.
    """
    if "pixel_values" not in model.kind.inputs:
        return None
    fields = _read(folder / "preprocessor_config.json")
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else (int(n) for n in size)
    if not fields.get("do_rescale", True):
        raise UnsupportedModelError(
            f"{folder}: preprocessor_config.json has do_rescale false; devices scale to 0..1"
        )
    channels = int(getattr(model.config, "num_channels", 3))
    normal = fields.get("do_normalize", True)
    wanted = fields.get("size", {})
    edge = wanted.get("shortest_edge", 0) if isinstance(wanted, dict) else 0
    try:
        return ImageInput(
            height=height,
            width=width,
            shortest_edge=int(edge) if fields.get("do_center_crop") else 0,
            mean=_numbers(fields.get("image_mean", 0.5) if normal else 0.0, channels),
            std=_numbers(fields.get("image_std", 0.5) if normal else 1.0, channels),
        )
    except ManifestError as error:
        raise UnsupportedModelError(f"{folder}: preprocessor_config.json: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not JSON: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the added tokens, the special ones among them, by content."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}


def _name(names: Mapping[str, Any], role: str) -> str:
    """A special token's content; older files wrap it in an object."""
    token = names.get(role)
    return str(token.get("content", "") if isinstance(token, dict) else token)


def _positions(model: Model) -> int:
    """Tokens that a text may have; 0 where the configuration names no bound."""
    config = model.config
    positions = int(getattr(config, "max_position_embeddings", 0) or 0)
    if positions and config.model_type in _PADDED_POSITIONS:
        positions -= int(config.pad_token_id) + 1
    return max(0, positions - model.prompt_tokens)


def _end_ids(folder: Path, model: Model) -> tuple[int, ...]:
    own = getattr(model.config, "eos_token_id", None)
    ids = _read(folder / "generation_config.json").get("eos_token_id", own)
    if ids is None:
        return ()
    return tuple(int(n) for n in ids) if isinstance(ids, list) else (int(ids),)


def _numbers(value: float | list[float], channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * channels
    return tuple(float(number) for number in values[:channels])
