# SPDX-License-Identifier: Apache-2.0
"""How an adapter of each kind lies in a folder: names of its tensors, and its configuration.

Where PEFT has the kind, all of it is as PEFT writes it. The other kinds keep the base model's own
names, so that ``load_state_dict`` takes them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.errors import LorikitError
from lorikit.server.methods.base import AdapterSpace

ROLES: Mapping[str, frozenset[str]] = {
    "lora": frozenset({"lora_A", "lora_B"}),
    "dora": frozenset({"lora_A", "lora_B", "lora_magnitude"}),
    "ia3": frozenset({"ia3"}),
    "prompt": frozenset({"prompt"}),
    "bottleneck": frozenset({"adapter_down", "adapter_up"}),
    "bitfit": frozenset({"bias"}),
    "head": frozenset(),
}
"""Roles of the tensors beside the head, by kind of adapter."""

_PEFT_TYPES: Mapping[str, str] = {
    "lora": "LORA",
    "dora": "LORA",
    "ia3": "IA3",
    "prompt": "PROMPT_TUNING",
}
"""``peft_type`` of the kinds that PEFT has."""

_TASK_TYPES: Mapping[str, str] = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-language-modeling": "CAUSAL_LM",
}
"""``task_type`` of PEFT by kind of task; PEFT has none for the others and needs none."""

_PEFT_HEADS = ("classifier", "score")
"""Modules that PEFT saves whole for classification of sequences or tokens, whatever is asked."""

_OUTSIDE_PEFT = "not in PEFT, README.md shows how to load it"

_PREFIX = "base_model.model."
_PROMPT_PREFIX = "base_model."
_PROMPT = "prompt_embeddings"
_MAGNITUDE = ".lora_magnitude_vector"


class ExportError(LorikitError):
    """An adapter cannot be written as, or read from, a folder; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """An adapter to be written, and what has to be said of it."""

    kind: str
    """A key of ``ROLES``."""
    tensors: Tensors
    """By name in the base model's own module path."""
    used: tuple[AdapterTensor, ...]
    """The tensors' rows, in the order of the space."""
    base_model: str
    task_kind: str
    targets: tuple[str, ...]
    labels: tuple[str, ...]
    scale: float
    rank: int | None
    use_rslora: bool

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that have a part of the adapter, the head's left out."""
        return tuple(dict.fromkeys(t.module for t in self.used if t.role != "head"))

    @property
    def head(self) -> tuple[str, ...]:
        """Modules that are stored whole."""
        return tuple(dict.fromkeys(t.module for t in self.used if t.role == "head"))

    @property
    def size(self) -> int:
        """Tokens of a soft prompt, width of a bottleneck, or 0."""
        first = {"prompt": "prompt", "bottleneck": "adapter_down"}.get(self.kind)
        rows = (len(self.tensors[t.name]) for t in self.used if t.role == first)
        return next(rows, 0)

    @property
    def ranks(self) -> dict[str, int]:
        """LoRA rank by module."""
        return {t.module: len(self.tensors[t.name]) for t in self.used if t.role == "lora_A"}


def is_in_peft(kind: str) -> bool:
    """Whether stock PEFT loads the kind."""
    return kind in _PEFT_TYPES


def checked_kind(tensors: Tensors, space: AdapterSpace) -> str:
    """Kind of adapter that the tensors make, after checking that they are whole.

    Raises:
        ExportError: A tensor the space does not know, a part of a module without the rest, LoRA
            factors that do not fit, or a mixture that is no kind.
    """
    known = {tensor.name: tensor for tensor in space.tensors}
    if unknown := sorted(set(tensors) - set(known)):
        raise ExportError(f"the base model has no adapter tensor {unknown[0]!r}")
    offered = {t.role for t in space.tensors} - {"head"}
    roles = {known[name].role for name in tensors} - {"head"}
    if not tensors or (offered and not roles):
        raise ExportError(
            f"the adapter holds none of the model's tensors of the roles {sorted(offered)}"
        )
    kind = next((kind for kind, wanted in ROLES.items() if wanted == roles), None)
    if kind is None:
        raise ExportError(
            f"no kind of adapter has tensors of the roles {sorted(roles)}; the kinds are "
            + ", ".join(f"{kind} ({', '.join(sorted(ROLES[kind])) or 'head'})" for kind in ROLES)
        )
    _check_whole_modules(tensors, space)
    _check_ranks(tensors, space)
    return kind


def configuration(content: Content) -> dict[str, Any]:
    """What stands in ``adapter_config.json``; PEFT fills the rest with its defaults."""
    common: dict[str, Any] = {"base_model_name_or_path": content.base_model}
    if not is_in_peft(content.kind):
        return common | _own_fields(content)
    common |= {
        "peft_type": _PEFT_TYPES[content.kind],
        "task_type": _task_type(content),
        "inference_mode": True,
        "modules_to_save": _whole_modules(content) or None,
    }
    if content.kind == "prompt":
        return common | _prompt_fields(content)
    common["target_modules"] = sorted(content.modules)
    if content.kind == "ia3":
        return common | {"feedforward_modules": [], "fan_in_fan_out": False}
    return common | _lora_fields(content)


def kind_in(config: Mapping[str, Any]) -> str | None:
    """Kind of the adapter that a configuration describes; None for one that is not ours."""
    own = str(config.get("adapter_kind"))
    if own in ROLES and not is_in_peft(own):
        return own
    if config.get("peft_type") == "LORA":
        return "dora" if config.get("use_dora") else "lora"
    return {"IA3": "ia3", "PROMPT_TUNING": "prompt"}.get(str(config.get("peft_type")))


def scale_in(config: Mapping[str, Any]) -> float:
    """LoRA scale s that a configuration describes; 1 for kinds without one."""
    if config.get("peft_type") != "LORA":
        return 1.0
    rank: int = config["r"]
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return float(config["lora_alpha"] / divisor)


def key_of(kind: str, name: str) -> str:
    """Key in the file of an adapter tensor."""
    if kind == "prompt":
        return name if name == _PROMPT else _PROMPT_PREFIX + name
    if not is_in_peft(kind):
        return name
    return _PREFIX + name.removesuffix(".weight" if _MAGNITUDE in name else "")


def name_of(kind: str, key: str) -> str | None:
    """Name of the adapter tensor of a key in a file; None for a key that is foreign to the kind."""
    if not is_in_peft(kind) or (kind == "prompt" and key == _PROMPT):
        return key
    prefix = _PROMPT_PREFIX if kind == "prompt" else _PREFIX
    if not key.startswith(prefix):
        return None
    return key.removeprefix(prefix) + (".weight" if key.endswith(_MAGNITUDE) else "")


def _check_whole_modules(tensors: Tensors, space: AdapterSpace) -> None:
    begun = {t.module for t in space.tensors if t.name in tensors}
    for tensor in space.tensors:
        if tensor.module in begun and tensor.name not in tensors:
            raise ExportError(f"{tensor.module}: {tensor.name} is missing beside the others")


def _check_ranks(tensors: Tensors, space: AdapterSpace) -> None:
    for a, b in space.pairs():
        if a.name not in tensors:
            continue
        rank, other = tensors[a.name].shape[0], tensors[b.name].shape[1]
        if rank != other:
            raise ExportError(f"{a.module}: A has rank {rank}, B has rank {other}")


def _task_type(content: Content) -> str | None:
    """PEFT puts a soft prompt before the input only where it knows a task.

    Filling in words is none of them; extracting features does with a prompt what is needed.
    """
    if content.kind == "prompt":
        return _TASK_TYPES.get(content.task_kind, "FEATURE_EXTRACTION")
    return _TASK_TYPES.get(content.task_kind)


def _whole_modules(content: Content) -> list[str]:
    """Modules that PEFT shall store whole; one within a head that it stores anyway is that head."""
    saves_heads = content.task_kind in ("sequence-classification", "token-classification")
    outer = ((name.partition(".")[0], name) for name in content.head)
    return sorted({root if saves_heads and root in _PEFT_HEADS else n for root, n in outer})


def _lora_fields(content: Content) -> dict[str, Any]:
    common = content.rank or Counter(content.ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in content.ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": _alpha(content, common),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": content.kind == "dora",
        "use_rslora": content.use_rslora,
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(content, rank) for module, rank in others.items()},
    }


def _alpha(content: Content, rank: int) -> int | float:
    """The alpha that makes the scale at a rank; an integer where it is one, as PEFT writes it.

    PEFT's scale is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    Source: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732, theorem 3.2.
    """
    alpha = content.scale * (math.sqrt(rank) if content.use_rslora else rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def _prompt_fields(content: Content) -> dict[str, Any]:
    return {
        "num_virtual_tokens": content.size,
        "token_dim": content.tensors[_PROMPT].shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def _own_fields(content: Content) -> dict[str, Any]:
    """PEFT refuses the folder by quoting ``peft_type``, so that says where to look."""
    fields: dict[str, Any] = {
        "adapter_kind": content.kind,
        "peft_type": f"{content.kind} ({_OUTSIDE_PEFT})",
        "task_kind": content.task_kind,
        "modules": sorted(content.modules),
        "modules_to_save": sorted(content.head),
    }
    return fields | ({"size": content.size} if content.size else {})
