# SPDX-License-Identifier: Apache-2.0
"""Adapters as folders: what ``peft.PeftModel.from_pretrained`` loads as it is, where PEFT can.

A folder holds ``adapter_model.safetensors``, ``adapter_config.json``, ``labels.json`` and a short
model card with the lines that load it. Neither torch nor PEFT is needed to write or to read one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lorikit.proto.tensors import Tensors
from lorikit.server.export_card import card
from lorikit.server.export_layout import (
    Content,
    ExportError,
    checked_kind,
    configuration,
    key_of,
    kind_in,
    name_of,
    scale_in,
)
from lorikit.server.methods.base import AdapterSpace

__all__ = ["ExportError", "ExportedAdapter", "read_adapter", "write_adapter"]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
LABELS_FILE = "labels.json"
CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedAdapter:
    """What a folder holds."""

    tensors: Tensors
    """By name in the base model's own module path."""
    base_model: str
    scale: float
    """LoRA scale s, the same for every module; 1 for kinds without one."""
    ranks: Mapping[str, int]
    """LoRA rank by module."""
    labels: tuple[str, ...]
    """Class names by index; empty if the folder does not say."""
    kind: str = "lora"
    """Kind of adapter, as in ``AdapterConfig.kind``."""


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
    task_kind: str = "sequence-classification",
    use_rslora: bool = False,
) -> Path:
    """Write an adapter as a folder; an existing folder of that name is replaced.

    The roles of the tensors say which kind it is. Everything is written to a new folder beside it,
    flushed to the disk and renamed, so a folder is complete or absent.

    Args:
        folder: Where to write.
        tensors: The adapter and the head by their own names, float32; LoRA of any rank per module.
        space: Says which tensor plays which role.
        base_model: Name or path of the base model, as PEFT shall find it.
        targets: Names of the adapted kinds of module, for the model card. PEFT gets the full path
            of every module, so that nothing else of the same name is adapted by accident.
        scale: LoRA scale s; ``lora_alpha`` becomes ``s * rank``.
        rank: The configuration's ``r``; None for the most frequent rank. Modules of another rank
            stand in ``rank_pattern`` and ``alpha_pattern``.
        labels: Class names by index.
        task_kind: Kind of the task, a key of ``compile.architectures.TASK_KINDS``.
        use_rslora: Write the same scale as rank-stabilised LoRA: ``lora_alpha`` is then
            ``s * sqrt(rank)``.

    Returns:
        The folder.

    Raises:
        ExportError: A tensor the space does not know, a part of a module without the rest, factors
            that do not fit, or a mixture of kinds.
    """
    kind = checked_kind(tensors, space)
    content = Content(
        kind=kind,
        tensors=tensors,
        used=tuple(tensor for tensor in space.tensors if tensor.name in tensors),
        base_model=base_model,
        task_kind=task_kind,
        targets=tuple(targets),
        labels=tuple(labels),
        scale=scale,
        rank=rank,
        use_rslora=use_rslora,
    )
    arrays = {key_of(kind, name): np.asarray(tensors[name], "<f4", order="C") for name in tensors}
    files = {
        WEIGHTS_FILE: save(arrays, metadata={"format": "pt"}),
        CONFIG_FILE: _json(configuration(content)),
        LABELS_FILE: _json(list(labels)),
        CARD_FILE: card(content, LABELS_FILE).encode(),
    }
    return _publish(folder, files)


def read_adapter(folder: Path) -> ExportedAdapter:
    """Read a folder that ``write_adapter`` wrote, or a PEFT folder of the same kind.

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
    kind = kind_in(config)
    if kind is None:
        raise ExportError(
            f"{folder} holds a {config.get('peft_type')!r} adapter, which Lorikit does not read"
        )
    tensors: Tensors = {}
    for key, values in arrays.items():
        name = name_of(kind, key)
        if name is None:
            raise ExportError(f"{folder}: tensor {key!r} is no part of a {kind} adapter")
        tensors[name] = np.asarray(values, np.float32)
    end = ".lora_A.weight"
    return ExportedAdapter(
        tensors=tensors,
        base_model=str(config.get("base_model_name_or_path") or ""),
        scale=scale_in(config),
        ranks={n.removesuffix(end): v.shape[0] for n, v in tensors.items() if n.endswith(end)},
        labels=tuple(str(name) for name in names),
        kind=kind,
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
