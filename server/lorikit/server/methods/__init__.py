# SPDX-License-Identifier: Apache-2.0
"""Federated methods: one a file.

``METHODS`` is for configuration that is text; programs make the objects themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorikit.server.methods.base import Method
from lorikit.server.methods.facts import MethodFacts
from lorikit.server.methods.fedbf import FedBF, FedBFConfig
from lorikit.server.methods.fedex_lora import FedExLoRA, FedExLoRAConfig
from lorikit.server.methods.fedit import FedIT, FedITConfig
from lorikit.server.methods.fedpeft_bias import FedPEFTBias, FedPEFTBiasConfig
from lorikit.server.methods.fedra import FedRA, FedRAConfig
from lorikit.server.methods.ffa_lora import FFALoRA, FFALoRAConfig
from lorikit.server.methods.flexlora import FlexLoRA, FlexLoRAConfig
from lorikit.server.methods.flora import FLoRA, FLoRAConfig
from lorikit.server.methods.frlora import FRLoRA, FRLoRAConfig
from lorikit.server.methods.head_start import HeadStart, HeadStartConfig
from lorikit.server.methods.hetlora import HetLoRA, HetLoRAConfig
from lorikit.server.methods.legend import Legend, LegendConfig
from lorikit.server.methods.lora_a2 import LoRAA2, LoRAA2Config
from lorikit.server.methods.lora_fair import LoRAFair, LoRAFairConfig
from lorikit.server.methods.rolora import RoLoRA, RoLoRAConfig
from lorikit.server.methods.server_optimizer import ServerOptimizer, ServerOptimizerConfig
from lorikit.server.methods.state import pack_state, unpack_state

__all__ = [
    "CONFIGS",
    "FACTS",
    "METHODS",
    "HeadStart",
    "HeadStartConfig",
    "ServerOptimizer",
    "ServerOptimizerConfig",
    "base_delta_rank",
    "build_method",
    "pack_state",
    "unpack_state",
]

METHODS: Mapping[str, type[Method]] = {
    "fedbf": FedBF,
    "fedex-lora": FedExLoRA,
    "fedit": FedIT,
    "fedpeft-bias": FedPEFTBias,
    "fedra": FedRA,
    "ffa-lora": FFALoRA,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "frlora": FRLoRA,
    "hetlora": HetLoRA,
    "legend": Legend,
    "lora-a2": LoRAA2,
    "lora-fair": LoRAFair,
    "rolora": RoLoRA,
}
"""Method class by name."""

CONFIGS: Mapping[str, type[Any]] = {
    "fedbf": FedBFConfig,
    "fedex-lora": FedExLoRAConfig,
    "fedit": FedITConfig,
    "fedpeft-bias": FedPEFTBiasConfig,
    "fedra": FedRAConfig,
    "ffa-lora": FFALoRAConfig,
    "flexlora": FlexLoRAConfig,
    "flora": FLoRAConfig,
    "frlora": FRLoRAConfig,
    "hetlora": HetLoRAConfig,
    "legend": LegendConfig,
    "lora-a2": LoRAA2Config,
    "lora-fair": LoRAFairConfig,
    "rolora": RoLoRAConfig,
}
"""Configuration class by name of the method."""

FACTS: Mapping[str, MethodFacts] = {
    "fedbf": FedBF.facts,
    "fedex-lora": FedExLoRA.facts,
    "fedit": FedIT.facts,
    "fedpeft-bias": FedPEFTBias.facts,
    "fedra": FedRA.facts,
    "ffa-lora": FFALoRA.facts,
    "flexlora": FlexLoRA.facts,
    "flora": FLoRA.facts,
    "frlora": FRLoRA.facts,
    "hetlora": HetLoRA.facts,
    "legend": Legend.facts,
    "lora-a2": LoRAA2.facts,
    "lora-fair": LoRAFair.facts,
    "rolora": RoLoRA.facts,
}
"""What to know of a method before choosing it, by name."""


def build_method(
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    scale: float = 2.0,
    min_rank: int | None = None,
    local_steps: int | None = None,
) -> Method:
    """The method of that name with those options.

    Args:
        name: A name of ``METHODS``.
        options: Fields of the method's configuration; they win over the arguments below.
        scale: LoRA scale s of the run.
        min_rank: Smallest rank of the run, for methods with mixed ranks; None for the default.
        local_steps: Optimiser steps a round, for methods that reckon with time.

    Raises:
        ValueError: Unknown method, unknown option, or a bad value; the message names what is known.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are: {', '.join(sorted(METHODS))}")
    fields = {field.name: field for field in dataclasses.fields(CONFIGS[name])}
    given = dict(options or {})
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}; it has: {', '.join(sorted(fields))}"
            f"{_methods_with(unknown)}"
        )
    run = {"scale": scale, "min_rank": min_rank, "local_steps": local_steps}
    values: dict[str, object] = {
        key: value for key, value in run.items() if key in fields and value is not None
    }
    values |= {key: _typed(name, fields[key], value) for key, value in given.items()}
    try:
        config = CONFIGS[name](**values)
    except ValueError as error:
        raise ValueError(f"options of {name}: {error}") from error
    method: Method = METHODS[name](config)  # type: ignore[call-arg]  # every one takes its config
    return method


def base_delta_rank(
    name: str, options: Mapping[str, object] | None = None, *, max_rank: int
) -> int | None:
    """Largest rank of the base deltas that a method sends; 0 for no limit, None for no deltas.

    Args:
        name: A name of ``METHODS``.
        options: Fields of the method's configuration.
        max_rank: Rank of the global adapter, which LoRA-A2's frozen ranks add up to at most.
    """
    if not FACTS[name].changes_base:
        return None
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(CONFIGS[name])}
    limit: int = {**defaults, **(options or {})}.get("delta_rank", max_rank)
    return limit


def _methods_with(options: Sequence[str]) -> str:
    """The methods that have all of those options, as the end of a sentence; empty without any."""
    having = [
        name
        for name, config in CONFIGS.items()
        if set(options) <= {field.name for field in dataclasses.fields(config)}
    ]
    return f"; methods that have it: {', '.join(having)}" if having else ""


def _typed(method: str, field: dataclasses.Field[Any], value: object) -> object:
    """The value, if its type is that of the field's default; integers count as floats too."""
    wanted = type(field.default)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(
            f"option {field.name} of {method} must be a {wanted.__name__}, got {value!r}"
        )
    return value
