# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model folder with PEFT's LoRA inserted becomes a forward graph.

Torch exports the model once; everything after that is a pass over the graph. The frozen weights
stay constants in their own [out, in] layout, the adapter tensors and the LoRA scale become inputs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript import optimizer
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from lorikit.proto.manifest import AdapterTensor, Task
from lorikit.proto.tensors import Tensors
from lorikit.server.compile.architectures import Architecture, architecture_of
from lorikit.server.compile.cleaning import fuse_linear, merge_equal
from lorikit.server.compile.graph import Array, Graph, Port
from lorikit.server.compile.onnx_format import OPSET, from_onnx
from lorikit.server.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

FOLD_LIMIT_BYTES = 1 << 16
"""Largest constant the exporter's own computations may be folded into; parameters never are."""


@dataclass(frozen=True, slots=True)
class Model:
    """A base model in torch, with PEFT layers in place."""

    module: torch.nn.Module
    architecture: Architecture
    adapter: tuple[AdapterTensor, ...]
    """Adapter tensors in the order of the modules."""
    parameters: Mapping[str, str]
    """Adapter tensor name -> parameter name in ``module``."""
    layer_count: int

    def set_adapter(self, tensors: Tensors, scale: float) -> None:
        """Load adapter values of any rank and the LoRA scale into the torch module."""
        for name, parameter in self.parameters.items():
            owner, _, leaf = parameter.rpartition(".")
            value = torch.from_numpy(np.array(tensors[name], dtype=np.float32))
            setattr(self.module.get_submodule(owner), leaf, torch.nn.Parameter(value))
        for layer in self.lora_layers():
            _scaling(layer)["default"] = scale

    def adapter_parameter(self, name: str) -> torch.nn.Parameter:
        """The torch parameter of an adapter tensor."""
        return self.module.get_parameter(self.parameters[name])

    def lora_layers(self) -> list[torch.nn.Module]:
        """Modules that PEFT put in place of a linear layer."""
        return [m for m in self.module.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]


def load_model(folder: Path, task: Task, targets: Sequence[str], *, seed: int = 0) -> Model:
    """Load a model folder for a task and insert LoRA with PEFT.

    Args:
        folder: Local Hugging Face folder.
        task: What to train it for; the labels fix the width of the head.
        targets: Names of the linear modules that get LoRA, for example ``query``, ``value``.
        seed: Of the head where the folder has none.

    Raises:
        UnsupportedModelError: Not a model folder, an unknown architecture, an unknown task, or a
        target
            that matches no module.
    """
    config = _config(folder)
    architecture = architecture_of(config, task)
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        module = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=len(task.labels),
            local_files_only=True,
            attn_implementation="eager",
            dtype=torch.float32,
        )
    module.eval()
    module.requires_grad_(False)
    named = {name.rpartition(".")[2] for name, m in module.named_modules() if _is_linear(m)}
    missing = sorted(set(targets) - named)
    if missing or not targets:
        raise UnsupportedModelError(
            f"no linear module is named {missing or targets}; this model has {sorted(named)}"
        )
    lora = LoraConfig(r=2, target_modules=list(targets), exclude_modules=[architecture.head])
    with _quiet():
        module = inject_adapter_in_model(lora, module)
    adapter, parameters = _adapter_tensors(module, architecture)
    return Model(module, architecture, adapter, parameters, architecture.layer_count(config))


def export_forward(model: Model) -> Graph:
    """Forward graph of the model: tokens and adapter in, logits and head features out.

    Inputs: ``input_ids`` and ``attention_mask`` int64 [batch, length]; ``lora_scale`` float32 [];
    every adapter tensor. Outputs: ``logits`` [batch, classes], ``features`` [batch, width].
    """
    ids = torch.randint(1, 100, (2, 7))
    mask = torch.ones_like(ids)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    tokens = {0: batch, 1: length}
    with _quiet():
        program = torch.onnx.export(
            _Forward(model),
            (ids, mask, torch.tensor(2.0)),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask", "lora_scale"],
            output_names=["logits", "features"],
            dynamic_shapes={"input_ids": tokens, "attention_mask": tokens, "lora_scale": None},
        )
    assert program is not None
    ir_model = program.model
    parameters = _lift_parameters(ir_model, model)
    optimizer.optimize_ir(
        ir_model, input_size_limit=FOLD_LIMIT_BYTES, output_size_limit=FOLD_LIMIT_BYTES
    )
    graph = from_onnx(onnx.shape_inference.infer_shapes(onnx_ir.to_proto(ir_model)))
    _strip_prefix(graph)
    _freeze(graph, parameters)
    fuse_linear(graph)
    merge_equal(graph)
    return graph


class _Forward(torch.nn.Module):
    """Calls the model with the LoRA scale as a tensor, and taps the input of the head."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.base = model.module
        self._lora = model.lora_layers()
        self._head = model.architecture.head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, lora_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = [_scaling(layer)["default"] for layer in self._lora]
        features: list[torch.Tensor] = []
        head = self.base.get_submodule(self._head)
        hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        for layer in self._lora:
            _scaling(layer)["default"] = lora_scale
        try:
            logits = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            hook.remove()
            for layer, scale in zip(self._lora, before, strict=True):
                _scaling(layer)["default"] = scale
        return logits, features[0].clone()


def _scaling(layer: torch.nn.Module) -> dict[str, Any]:
    """PEFT's table of scales by adapter name; floats, or a tensor while exporting."""
    return cast(dict[str, Any], layer.scaling)


def _config(folder: Path) -> object:
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} is not a Hugging Face model folder: it has no config.json"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        raise UnsupportedModelError(f"{folder}: config.json cannot be read: {error}") from error


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def _adapter_tensors(
    module: torch.nn.Module, architecture: Architecture
) -> tuple[tuple[AdapterTensor, ...], dict[str, str]]:
    tensors: list[AdapterTensor] = []
    parameters: dict[str, str] = {}
    for parameter_name, parameter in module.named_parameters():
        owner, role = _role(parameter_name, architecture.head)
        if role is None:
            continue
        name = parameter_name.replace(".default.", ".")
        rows, columns = (parameter.shape[0], parameter.shape[-1])
        shape: tuple[int | str, ...] = tuple(parameter.shape)
        if role == "lora_A":
            shape = ("rank", columns)
        elif role == "lora_B":
            shape = (rows, "rank")
        layer = architecture.layer_of(owner)
        tensors.append(
            AdapterTensor(
                name=name, role=role, module=owner, layer=layer, shape=shape, trained=True
            )
        )
        parameters[name] = parameter_name
    return tuple(tensors), parameters


def _role(parameter: str, head: str) -> tuple[str, str | None]:
    for role in ("lora_A", "lora_B"):
        owner, found, _ = parameter.partition(f".{role}.")
        if found:
            return owner, role
    if parameter.startswith(f"{head}."):
        return head, "head"
    return "", None


def _lift_parameters(ir_model: onnx_ir.Model, model: Model) -> dict[str, Array]:
    """Make every parameter an input, so that nothing is folded into it; return the frozen ones.

    Adapter tensors get their final names and one rank symbol per module.
    """
    graph = ir_model.graph
    tensors = {f"base.{model.parameters[t.name]}": t for t in model.adapter}
    symbols: dict[str, str] = {}
    frozen: dict[str, Array] = {}
    for name, _ in model.module.named_parameters(prefix="base"):
        if name not in graph.initializers:
            if name in tensors:
                raise UnsupportedModelError(f"{name} has no part in the exported graph")
            continue
        value = graph.initializers.pop(name)
        assert value.const_value is not None
        if name in tensors:
            tensor = tensors[name]
            symbol = symbols.setdefault(tensor.module, f"rank_{len(symbols)}")
            value.shape = onnx_ir.Shape(symbol if n == "rank" else n for n in tensor.shape)
            value.name = tensor.name
        else:
            frozen[name.removeprefix("base.")] = value.const_value.numpy()
        value.const_value = None
        graph.inputs.append(value)
    return frozen


def _clean(name: str) -> str:
    return name.removeprefix("base.")


def _strip_prefix(graph: Graph) -> None:
    """Name values as the base model does: without the wrapper's ``base.``."""
    for node in graph.nodes:
        node.inputs = tuple(_clean(name) for name in node.inputs)
        node.outputs = tuple(_clean(name) for name in node.outputs)
        node.scope = _clean(node.scope)
    graph.constants = {_clean(name): value for name, value in graph.constants.items()}
    graph.inputs = [Port(_clean(p.name), p.dtype, p.shape) for p in graph.inputs]
    graph.shapes = {_clean(name): shape for name, shape in graph.shapes.items()}


def _freeze(graph: Graph, parameters: Mapping[str, Array]) -> None:
    """Turn the frozen parameters from inputs back into constants."""
    graph.inputs = [port for port in graph.inputs if port.name not in parameters]
    graph.constants.update(parameters)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]  # noqa: ANN202  # a generator for the decorator
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
