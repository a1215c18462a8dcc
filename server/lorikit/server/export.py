# SPDX-License-Identifier: Apache-2.0
"""Adapters as stock PEFT folders: what ``peft.PeftModel.from_pretrained`` loads as it is.

A folder holds ``adapter_model.safetensors``, ``adapter_config.json``, ``labels.json`` and a short
model card. Neither torch nor PEFT is needed to write or to read one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lorikit.proto.tensors import Tensors
from lorikit.server.errors import LorikitError
from lorikit.server.methods.base import AdapterSpace

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
LABELS_FILE = "labels.json"
CARD_FILE = "README.md"

_PREFIX = "base_model.model."


class ExportError(LorikitError):
    """An adapter cannot be written as, or read from, a PEFT folder; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedAdapter:
    """What a folder holds."""

    tensors: Tensors
    """By name in the base model's own module path."""
    base_model: str
    scale: float
    """LoRA scale s, the same for every module."""
    ranks: Mapping[str, int]
    """LoRA rank by module."""
    labels: tuple[str, ...]
    """Class names by index; empty if the folder does not say."""


def write_adapter(
    folder: Path,
    tensors: Tensors,
    *,
    space: AdapterSpace,
    base_model: str,
    targets: Sequence[str],
    scale: float,
    rank: int | None = None,
    labels: Sequence[str] = (),
) -> Path:
    """Write an adapter as a PEFT folder; an existing folder of that name is replaced.

    Everything is written to a new folder beside it, flushed to the disk and renamed, so a folder
    is complete or absent.

    Args:
        folder: Where to write.
        tensors: LoRA pairs, any rank per module, and the head, by their own names, float32.
        space: Says which tensor plays which role.
        base_model: Name or path of the base model, as PEFT shall find it.
        targets: Names of the adapted kinds of module, for the model card. PEFT gets the full path
            of every module, so that nothing else of the same name is adapted by accident.
        scale: LoRA scale s; ``lora_alpha`` becomes ``s * rank``.
        rank: The configuration's ``r``; None for the most frequent rank. Modules of another rank
            stand in ``rank_pattern`` and ``alpha_pattern``.
        labels: Class names by index.

    Returns:
        The folder.

    Raises:
        ExportError: A tensor the space does not know, half a pair, or factors that do not fit.
    """
    ranks = _ranks(tensors, space)
    config = _peft_config(tensors, space, ranks, scale=scale, rank=rank, base_model=base_model)
    arrays = {_PREFIX + name: np.asarray(tensors[name], "<f4", order="C") for name in tensors}
    files = {
        WEIGHTS_FILE: save(arrays, metadata={"format": "pt"}),
        CONFIG_FILE: _json(config),
        LABELS_FILE: _json(list(labels)),
        CARD_FILE: _card(base_model, targets, scale, ranks, labels).encode(),
    }
    return _publish(folder, files)


def read_adapter(folder: Path) -> ExportedAdapter:
    """Read a folder that ``write_adapter`` wrote, or a PEFT LoRA folder of the same kind.

    Raises:
        ExportError: A file is missing or damaged, or the folder holds another kind of adapter.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        arrays = load((folder / WEIGHTS_FILE).read_bytes())
        labels = folder / LABELS_FILE
        names = json.loads(labels.read_bytes()) if labels.exists() else []
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} is not a readable PEFT folder: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder} holds a {config.get('peft_type')!r} adapter, not LORA")
    foreign = [name for name in arrays if not name.startswith(_PREFIX)]
    if foreign:
        raise ExportError(f"{folder}: tensor {foreign[0]!r} does not start with {_PREFIX!r}")
    tensors = {
        name.removeprefix(_PREFIX): np.asarray(values, np.float32)
        for name, values in arrays.items()
    }
    end = ".lora_A.weight"
    return ExportedAdapter(
        tensors=tensors,
        base_model=str(config.get("base_model_name_or_path") or ""),
        scale=config["lora_alpha"] / config["r"],
        ranks={n.removesuffix(end): v.shape[0] for n, v in tensors.items() if n.endswith(end)},
        labels=tuple(str(name) for name in names),
    )


def _ranks(tensors: Tensors, space: AdapterSpace) -> dict[str, int]:
    """Rank by module, after checking that the tensors form whole pairs of fitting shapes."""
    unknown = sorted(set(tensors) - {tensor.name for tensor in space.tensors})
    if unknown:
        raise ExportError(f"the base model has no adapter tensor {unknown[0]!r}")
    known = ("lora_A", "lora_B", "head")
    unfit = [t.name for t in space.tensors if t.role not in known and t.name in tensors]
    if unfit:
        raise ExportError(f"a LoRA folder cannot hold {unfit[0]!r}; export LoRA and head only")
    ranks: dict[str, int] = {}
    for a, b in space.pairs():
        if (a.name in tensors) != (b.name in tensors):
            raise ExportError(f"{a.module}: one factor of the pair is missing")
        if a.name not in tensors:
            continue
        rank = tensors[a.name].shape[0]
        if tensors[b.name].shape[1] != rank:
            raise ExportError(
                f"{a.module}: A has rank {rank}, B has rank {tensors[b.name].shape[1]}"
            )
        ranks[a.module] = rank
    if not ranks:
        raise ExportError("the adapter holds no LoRA pair")
    return ranks


def _peft_config(
    tensors: Tensors,
    space: AdapterSpace,
    ranks: Mapping[str, int],
    *,
    scale: float,
    rank: int | None,
    base_model: str,
) -> dict[str, Any]:
    """The fields PEFT needs; it fills the others with its defaults, which change nothing."""
    common = rank or Counter(ranks.values()).most_common(1)[0][0]
    others = {module: r for module, r in ranks.items() if r != common}
    head = sorted({t.module for t in space.named("head") if t.name in tensors})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": _alpha(scale, common),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "modules_to_save": head or None,
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(scale, r) for module, r in others.items()},
    }


def _alpha(scale: float, rank: int) -> int | float:
    """``scale * rank``, as an integer where it is one, which is how PEFT writes it."""
    alpha = scale * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def _card(
    base_model: str,
    targets: Sequence[str],
    scale: float,
    ranks: Mapping[str, int],
    labels: Sequence[str],
) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    spread = f"rank {low}" if low == high else f"ranks {low} to {high}"
    kinds = ", ".join(targets) or "the listed modules"
    return (
        f"---\nbase_model: {json.dumps(base_model)}\nlibrary_name: peft\n"
        "tags: [lora, federated-learning, lorikit]\n---\n\n"
        "# LoRA adapter trained with Lorikit\n\n"
        f"LoRA of {spread} on {kinds} ({len(ranks)} modules), scale {scale:g}, "
        f"with a classification head of {len(labels)} classes (names in `{LABELS_FILE}`).\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        "base = AutoModelForSequenceClassification.from_pretrained(\n"
        f"    {base_model!r}, num_labels={len(labels)}\n)\n"
        'model = PeftModel.from_pretrained(base, ".")\n'
        "```\n"
    )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _publish(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        for name, data in files.items():
            _write(new / name, data)
        _flush(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make renames in the folder durable, where the system can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
