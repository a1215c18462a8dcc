# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model folder as a torch module with an adapter in place."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

from lorikit.proto.manifest import AdapterTensor, Task
from lorikit.proto.tensors import Tensors
from lorikit.server.compile.architectures import (
    Architecture,
    TaskKind,
    architecture_of,
    kind_of,
)
from lorikit.server.compile.base_deltas import deltas_of
from lorikit.server.compile.dropout import dropout_mask
from lorikit.server.compile.insertion import PROMPT, AdapterConfig, insert_adapter
from lorikit.server.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Model:
    """A base model in torch, with its adapter in place."""

    module: torch.nn.Module
    architecture: Architecture
    kind: TaskKind
    task: Task
    adapter: tuple[AdapterTensor, ...]
    """Adapter tensors in the order of the modules."""
    parameters: Mapping[str, str]
    """Adapter tensor name -> parameter name in ``module``."""
    dropout: float = 0.0
    """Probability that an input of a LoRA factor A is dropped while training."""
    deltas: tuple[AdapterTensor, ...] = ()
    """Base deltas that the graphs offer; torch has them in its frozen weights."""

    @property
    def tensors(self) -> tuple[AdapterTensor, ...]:
        """Everything that travels as the adapter."""
        return (*self.adapter, *self.deltas)

    @property
    def config(self) -> Any:  # noqa: ANN401  # differs by architecture
        """The configuration of transformers."""
        return self.module.config

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The layers, all or those of the sub-model in place."""
        layers = self.module.get_submodule(self.architecture.layers)
        assert isinstance(layers, torch.nn.ModuleList)
        return layers

    @property
    def layer_count(self) -> int:
        """Number of layers in place."""
        return len(self.layers)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the soft prompt; 0 without one."""
        return len(getattr(self.module, PROMPT, ()))

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of a batch, and the input of the last linear map.

        A soft prompt is put before the embedded tokens, as PEFT does; what the model says of the
        prompt's own positions is cut off where tokens have labels.
        """
        features: list[torch.Tensor] = []
        head = self.module.get_submodule(self.architecture.head)
        hook = head.register_forward_pre_hook(lambda _, given: features.append(given[0]))
        cache = {} if not hasattr(self.config, "use_cache") else {"use_cache": False}
        try:
            logits = self.module(**self._prompted(inputs), **cache).logits
        finally:
            hook.remove()
        first = self.prompt_tokens
        if first and self.kind.labels_tokens:
            return logits[:, first:], features[0][:, first:]
        return logits, features[0]

    def set_adapter(self, tensors: Tensors, scale: float) -> None:
        """Load adapter values of any rank and the LoRA scale into the torch module."""
        for name, parameter in self.parameters.items():
            if name not in tensors:
                continue
            owner, _, leaf = parameter.rpartition(".")
            value = torch.from_numpy(np.array(tensors[name], dtype=np.float32))
            part = self.module.get_submodule(owner)
            if isinstance(part, torch.nn.ParameterDict):
                part[leaf] = torch.nn.Parameter(value)
            else:
                setattr(part, leaf, torch.nn.Parameter(value))
        for layer in self.lora_layers():
            scaling(layer)["default"] = scale

    def adapter_parameter(self, name: str) -> torch.nn.Parameter:
        """The torch parameter of an adapter tensor."""
        return self.module.get_parameter(self.parameters[name])

    def lora_layers(self) -> list[torch.nn.Module]:
        """Modules that PEFT put in place of a linear layer."""
        return [m for m in self.module.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]

    def base_weight(self, module: str) -> torch.nn.Parameter:
        """The frozen weight that a LoRA module stands beside, [d_out, d_in]."""
        return self.module.get_parameter(f"{module}.base_layer.weight")

    def lora_inputs(self) -> dict[str, torch.nn.Module]:
        """The module whose input dropout acts on, by name of its tensor A."""
        return {
            name: self.module.get_submodule(parameter.rpartition(".")[0])
            for name, parameter in self.parameters.items()
            if ".lora_A." in name
        }

    @contextlib.contextmanager
    def with_dropout(self, modules: Mapping[str, torch.nn.Module], seed: int) -> Iterator[None]:
        """Drop for a while what a training graph drops with that seed.

        Args:
            modules: From ``lora_inputs``, asked for while all layers are in place.
            seed: As fed to ``dropout_seed``.
        """
        chosen = modules if self.dropout else {}
        hooks = [
            module.register_forward_pre_hook(self._dropping(name, seed))
            for name, module in chosen.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _dropping(self, name: str, seed: int) -> Callable[..., torch.Tensor]:
        def drop(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
            kept = dropout_mask(seed, name, given[0].shape, self.dropout)
            return given[0] * torch.from_numpy(kept) / (1 - self.dropout)

        return drop

    @contextlib.contextmanager
    def with_layers(self, kept: Sequence[int]) -> Iterator[None]:
        """Leave only some layers in place for a while."""
        path, _, attribute = self.architecture.layers.rpartition(".")
        parent = self.module.get_submodule(path)
        layers = self.layers
        setattr(parent, attribute, torch.nn.ModuleList([layers[i] for i in kept]))
        try:
            yield
        finally:
            setattr(parent, attribute, layers)

    def _prompted(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.prompt_tokens:
            return dict(inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embedded = self.module.get_input_embeddings()(ids)  # type: ignore[operator]  # transformers' models have it
        prompt = self.module.get_parameter(PROMPT).unsqueeze(0).expand(ids.shape[0], -1, -1)
        ones = torch.ones(1, 1, dtype=mask.dtype).expand(ids.shape[0], self.prompt_tokens)
        return {
            "inputs_embeds": torch.cat([prompt, embedded], dim=1),
            "attention_mask": torch.cat([ones, mask], dim=1),
        }


def scaling(layer: torch.nn.Module) -> dict[str, Any]:
    """PEFT's table of scales by adapter name; floats, or a tensor while exporting."""
    return cast(dict[str, Any], layer.scaling)


def load_model(folder: Path, task: Task, adapter: AdapterConfig, *, seed: int = 0) -> Model:
    """Load a model folder for a task and insert an adapter.

    Args:
        folder: Local Hugging Face folder.
        task: What to train it for; the labels fix the width of the head.
        adapter: What trains.
        seed: Of the head where the folder has none, and of a soft prompt.

    Raises:
        UnsupportedModelError: Not a model folder, an unknown architecture, an unknown task, or a
            target that matches no module.
    """
    config = _config(folder)
    kind = kind_of(task)
    architecture = architecture_of(config, task)
    classes = {"num_labels": len(task.labels)} if kind.trains_head else {}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        module = getattr(transformers, kind.auto_class).from_pretrained(
            folder,
            local_files_only=True,
            ignore_mismatched_sizes=kind.trains_head,
            dtype=torch.float32,
            **classes,
            **_attention(config),
        )
        module.eval()
        module, tensors, parameters = insert_adapter(
            module, architecture, adapter.on(architecture), trains_head=kind.trains_head
        )
    module.eval()
    deltas = () if adapter.delta_rank is None else deltas_of(tensors)
    return Model(module, architecture, kind, task, tensors, parameters, adapter.dropout, deltas)


def _attention(config: object) -> dict[str, str]:
    """Attention in single operators, where the model has attention."""
    return {"attn_implementation": "eager"} if hasattr(config, "num_attention_heads") else {}


def _config(folder: Path) -> object:
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} is not a Hugging Face model folder: it has no config.json"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise UnsupportedModelError(f"{folder}: config.json cannot be read: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's and transformers' progress chatter out of our output."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "transformers")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
