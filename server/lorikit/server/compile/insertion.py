# SPDX-License-Identifier: Apache-2.0
"""Puts the trainable part of a PEFT kind into a torch model.

Where PEFT has the kind, PEFT's own modules go in, so that what is verified is what stock PEFT
computes. The parameters that train get names in the base model's own paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft import IA3Config, LoraConfig, inject_adapter_in_model

from lorikit.proto.manifest import AdapterTensor
from lorikit.server.compile.architectures import Architecture
from lorikit.server.errors import UnsupportedModelError

EXPORTED_RANK = 2
"""LoRA rank while exporting; the graph keeps the rank symbolic."""

PROMPT = "prompt_embeddings"
"""Parameter of a soft prompt, [tokens, width]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What trains beside the head."""

    kind: str = "lora"
    """``lora`` (Hu et al. 2021), ``dora`` (Liu et al. 2024), ``ia3`` (Liu et al. 2022), ``prompt``
    (Lester et al. 2021), ``bottleneck`` (Houlsby et al. 2019), ``bitfit`` (Ben Zaken et al. 2022)
    or ``head`` (nothing else)."""
    targets: tuple[str, ...] = ()
    """Linear modules by the last part of their names; empty for the architecture's usual ones, or
    for ``bitfit`` for all. Unused by ``prompt`` and ``head``."""
    size: int = 16
    """Tokens of a soft prompt, or width of a bottleneck."""
    dropout: float = 0.0
    """Probability that an input of a LoRA factor A is dropped while training; ``lora`` only."""
    delta_rank: int | None = None
    """None: packages change nothing beside LoRA. Else they offer base deltas, of any rank, and
    memory is reckoned for this one, 0 for as large as the modules can have; ``lora`` only."""
    principal_scale: float | None = None
    """None: LoRA starts with A random and B zero. Else with the principal part of each frozen
    weight, ``s B A`` its best approximation at this scale s; ``lora`` only.

    Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948, section 3."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedModelError(
                f"adapter kind {self.kind!r} is not one of {', '.join(KINDS)}"
            )
        if self.size < 1:
            raise UnsupportedModelError(f"adapter size must be at least 1, got {self.size}")
        if not 0 <= self.dropout < 1:
            raise UnsupportedModelError(
                f"adapter dropout must be at least 0 and below 1, got {self.dropout}"
            )
        if self.dropout and self.kind != "lora":
            raise UnsupportedModelError(
                f"adapter kind {self.kind!r} has no dropout; set it to 0 or use lora"
            )
        if self.kind != "lora" and (self.delta_rank, self.principal_scale) != (None, None):
            raise UnsupportedModelError(
                f"adapter kind {self.kind!r} has no base deltas and no principal start; use lora, "
                "or a method that changes no base, such as fedit"
            )

    def on(self, architecture: Architecture) -> AdapterConfig:
        """The same with the targets that are usual for an architecture where it names none."""
        if self.targets or self.kind in ("prompt", "bitfit", "head"):
            return self
        return replace(self, targets=architecture.targets)


class Bottleneck(torch.nn.Module):
    """y = h + U relu(D h + d) + u on the output h of a linear map; U starts at zero.

    Source: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2.1.
    """

    def __init__(self, base_layer: torch.nn.Linear, size: int) -> None:
        """Wrap a linear map; ``size`` is the width of the bottleneck."""
        super().__init__()
        width = base_layer.out_features
        self.base_layer = base_layer
        self.adapter_down = torch.nn.Linear(width, size)
        self.adapter_up = torch.nn.Linear(size, width)
        torch.nn.init.zeros_(self.adapter_up.weight)
        torch.nn.init.zeros_(self.adapter_up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_in] to [..., d_out]."""
        h = self.base_layer(x)
        y: torch.Tensor = h + self.adapter_up(torch.relu(self.adapter_down(h)))
        return y


def insert_adapter(
    module: torch.nn.Module,
    architecture: Architecture,
    config: AdapterConfig,
    *,
    trains_head: bool,
) -> tuple[torch.nn.Module, tuple[AdapterTensor, ...], dict[str, str]]:
    """Insert an adapter; the base's parameters are frozen.

    Returns:
        The module with it, the tensors that travel in the order of the modules, and the parameter
        of each by name.

    Raises:
        UnsupportedModelError: A target that matches no linear module, or nothing to train.
    """
    module.requires_grad_(False)
    inserted = _INSERTIONS[config.kind](module, architecture, config)
    tensors: list[AdapterTensor] = []
    parameters: dict[str, str] = {}
    heads = (architecture.head, *architecture.new_modules) if trains_head else ()
    for parameter_name, parameter in inserted.named_parameters():
        role, owner = _role(parameter_name, config, architecture, heads)
        if role is None:
            continue
        name = parameter_name.replace(".default", "")
        tensors.append(
            AdapterTensor(
                name=name,
                role=role,
                module=owner,
                layer=architecture.layer_of(owner),
                shape=_shape(role, tuple(parameter.shape)),
                trained=True,
            )
        )
        parameters[name] = parameter_name
    if not tensors:
        raise UnsupportedModelError(f"adapter kind {config.kind!r} leaves nothing to train here")
    return inserted, tuple(tensors), parameters


def linear_names(module: torch.nn.Module) -> set[str]:
    """Last parts of the names of the linear maps."""
    return {
        name.rpartition(".")[2]
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear)
    }


def _insert_lora(
    module: torch.nn.Module, architecture: Architecture, config: AdapterConfig
) -> torch.nn.Module:
    _check_targets(module, config.targets)
    lora = LoraConfig(
        r=EXPORTED_RANK,
        target_modules=list(config.targets),
        exclude_modules=_excluded(architecture),
        use_dora=config.kind == "dora",
    )
    return _injected(lora, module)


def _insert_ia3(
    module: torch.nn.Module, architecture: Architecture, config: AdapterConfig
) -> torch.nn.Module:
    _check_targets(module, config.targets)
    ia3 = IA3Config(
        target_modules=list(config.targets),
        feedforward_modules=[],
        exclude_modules=_excluded(architecture),
    )
    return _injected(ia3, module)


def _insert_bottleneck(
    module: torch.nn.Module, architecture: Architecture, config: AdapterConfig
) -> torch.nn.Module:
    _check_targets(module, config.targets)
    chosen = [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear)
        and name.rpartition(".")[2] in config.targets
        and architecture.layer_of(name) >= 0
    ]
    for name, part in chosen:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, Bottleneck(part, config.size))
    return module


def _insert_prompt(
    module: torch.nn.Module, architecture: Architecture, config: AdapterConfig
) -> torch.nn.Module:
    embedding = module.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it
    rows = torch.randint(0, embedding.weight.shape[0], (config.size,))
    module.register_parameter(PROMPT, torch.nn.Parameter(embedding.weight[rows].detach().clone()))
    return module


def _insert_nothing(
    module: torch.nn.Module, architecture: Architecture, config: AdapterConfig
) -> torch.nn.Module:
    return module


_INSERTIONS: Mapping[
    str, Callable[[torch.nn.Module, Architecture, AdapterConfig], torch.nn.Module]
] = {
    "lora": _insert_lora,
    "dora": _insert_lora,
    "ia3": _insert_ia3,
    "prompt": _insert_prompt,
    "bottleneck": _insert_bottleneck,
    "bitfit": _insert_nothing,
    "head": _insert_nothing,
}

KINDS = tuple(_INSERTIONS)
"""Adapter kinds by name."""

_MARKS: Mapping[str, str] = {
    ".lora_A.": "lora_A",
    ".lora_B.": "lora_B",
    ".lora_magnitude_vector.": "lora_magnitude",
    ".ia3_l.": "ia3",
    ".adapter_down.": "adapter_down",
    ".adapter_up.": "adapter_up",
}
"""Role by a part of a parameter's name."""


def _role(
    parameter: str, config: AdapterConfig, architecture: Architecture, heads: Sequence[str]
) -> tuple[str | None, str]:
    """Role of a parameter, None for a frozen one, and the module it belongs to."""
    owner = parameter.rpartition(".")[0]
    if owner in heads:
        return "head", owner
    for mark, role in _MARKS.items():
        before, found, _ = parameter.partition(mark)
        if found:
            return role, before
    if parameter == PROMPT:
        return "prompt", ""
    if config.kind == "bitfit" and _is_bias(parameter, config, architecture):
        return "bias", owner
    return None, ""


def _is_bias(parameter: str, config: AdapterConfig, architecture: Architecture) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    chosen = not config.targets or owner.rpartition(".")[2] in config.targets
    return leaf == "bias" and chosen and architecture.layer_of(owner) >= 0


def _shape(role: str, shape: tuple[int, ...]) -> tuple[int | str, ...]:
    if role == "lora_A":
        return ("rank", *shape[1:])
    if role == "lora_B":
        return (shape[0], "rank", *shape[2:])
    return shape


def _excluded(architecture: Architecture) -> list[str]:
    return [architecture.head, *architecture.new_modules]


def _injected(config: LoraConfig | IA3Config, module: torch.nn.Module) -> torch.nn.Module:
    return inject_adapter_in_model(config, module)


def _check_targets(module: torch.nn.Module, targets: Sequence[str]) -> None:
    named = linear_names(module)
    missing = sorted(set(targets) - named)
    if missing or not targets:
        raise UnsupportedModelError(
            f"no linear module is named {missing or targets}; this model has {sorted(named)}, "
            "and the kinds bitfit, prompt and head need none"
        )
