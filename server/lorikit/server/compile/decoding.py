# SPDX-License-Identifier: Apache-2.0
"""The graph that continues a text: a few tokens in, the next token's logits out.

Keys and values of earlier tokens come in as inputs and those of the new ones go out, so that each
token is computed once. The cache belongs to whoever runs the graph: the graph returns the new part
alone, and a token costs no copy of the whole. Tokens are its first axis, so that a part of a
larger array is whole in memory and need not be copied either. The first run has no past; a long
prompt may be given in several parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lorikit.proto.manifest import CacheShape
from lorikit.proto.tensors import Array
from lorikit.server.compile.architectures import CAUSAL_LANGUAGE_MODELING, Architecture
from lorikit.server.compile.export import to_graph
from lorikit.server.compile.graph import Graph, Port, Shape, dependents
from lorikit.server.compile.layers import keep_layers
from lorikit.server.compile.models import Model, scaling
from lorikit.server.compile.replicate import are_alike, replicate_last_layer
from lorikit.server.compile.verify import Probe, open_session, relative_error, worst_error
from lorikit.server.errors import UnsupportedModelError

PARTS = ("key", "value")
"""What a layer keeps of a token."""

_TOKENS = ("input_ids", "attention_mask", "position_ids")


def can_decode(model: Model) -> bool:
    """Whether the model continues texts and its cache holds tokens alone (no soft prompt)."""
    return model.task.kind == CAUSAL_LANGUAGE_MODELING and not model.prompt_tokens


def cache_shape(model: Model) -> CacheShape:
    """Heads and width of the keys and values that a layer keeps."""
    config = model.config
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CacheShape(
        heads=int(getattr(config, "num_key_value_heads", None) or heads), width=int(width)
    )


def export_decoding(model: Model) -> Graph:
    """Decoding graph of the whole model; frozen weights are constants.

    Inputs: ``input_ids``, ``attention_mask`` and ``position_ids`` int64 [batch, step];
    ``past_mask`` int64 [batch, past]; the cache of each layer float32 [past, batch, heads, width];
    ``lora_scale`` float32 [] where there is LoRA; every adapter tensor. Outputs: ``logits``
    float32 [batch, vocabulary] of the last token, and each layer's part of the cache for the new
    tokens, [step, batch, heads, width]. Padding stands on the left.

    Raises:
        UnsupportedModelError: The model does not continue texts, or has a soft prompt.
    """
    if not can_decode(model):
        raise UnsupportedModelError(
            f"{model.architecture.class_name} for {model.task.kind} has no decoding graph; only "
            "causal language models without a soft prompt have one"
        )
    count = model.layer_count
    if count <= 2 or not are_alike(model.layers):
        return _exported(model)
    with model.with_layers((0, 1)):
        graph = _exported(model)
    _repeat_layers(graph, model, count)
    return graph


def decoding_graph(decoding: Graph, model: Model, kept: Sequence[int]) -> Graph:
    """The decoding graph of a sub-model, with the cache under the names that devices know.

    Args:
        decoding: From ``export_decoding``; stays as it is.
        model: The model it was made of.
        kept: Layers of the sub-model, ascending. The cache is named by the full model's numbers:
            inputs ``past.<layer>.key`` and ``past.<layer>.value``, outputs ``new.<layer>.key`` and
            ``new.<layer>.value``.
    """
    graph = decoding.copy()
    architecture = model.architecture
    gone = set(range(model.layer_count)) - set(kept)
    graph.outputs = [p for p in graph.outputs if architecture.layer_of(p.name) not in gone]
    keep_layers(graph, architecture, kept, model.layer_count)
    names = {
        _internal(architecture, layer, time, part): f"{time}.{layer}.{part}"
        for layer in kept
        for time in ("past", "new")
        for part in PARTS
    }
    # What is said of the length of the past is asked of the first layer's cache, kept or not.
    graph.inputs = [p for p in graph.inputs if architecture.layer_of(p.name) not in gone]
    first = min(kept)
    names |= {
        _internal(architecture, layer, "past", part): f"past.{first}.{part}"
        for layer in gone
        for part in PARTS
    }
    _rename(graph, names)
    return graph


def _exported(model: Model) -> Graph:
    layers = range(model.layer_count)
    shape = cache_shape(model)
    batch, step, past = (torch.export.Dim(name) for name in ("batch", "step", "past"))
    ids = torch.randint(1, min(100, model.config.vocab_size), (2, 3))
    cache = [torch.rand(5, 2, shape.heads, shape.width) for _ in layers for _ in PARTS]
    tokens = (ids, torch.ones_like(ids), torch.arange(5, 8).expand(2, 3).contiguous())
    arrays = (*tokens, torch.ones(2, 5, dtype=torch.int64), *cache)
    dynamic = (
        *({0: batch, 1: step} for _ in tokens),
        {0: batch, 1: past},
        *({0: past, 1: batch} for _ in cache),
    )
    names = [
        [_internal(model.architecture, layer, time, part) for layer in layers for part in PARTS]
        for time in ("past", "new")
    ]
    graph = to_graph(
        model,
        _Decoder(model),
        (arrays, torch.tensor(2.0)),
        input_names=[*_TOKENS, "past_mask", *names[0], "lora_scale"],
        output_names=["logits", *names[1]],
        dynamic_shapes={"arrays": dynamic, "lora_scale": None},
    )
    _leave_layers(graph, model.architecture)
    return graph


class _Decoder(torch.nn.Module):
    """Calls the model with a cache and the LoRA scale as tensors."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.base = model.module
        self._lora = model.lora_layers()

    def forward(
        self, arrays: tuple[torch.Tensor, ...], lora_scale: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ids, mask, positions, past_mask, *past = arrays
        cache = _Cache(past)
        before = [scaling(layer)["default"] for layer in self._lora]
        for layer in self._lora:
            scaling(layer)["default"] = lora_scale
        try:
            logits = self.base(
                input_ids=ids,
                attention_mask=_visible(past_mask, mask),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        finally:
            for layer, scale in zip(self._lora, before, strict=True):
                scaling(layer)["default"] = scale
        return logits[:, 0], *cache.new


class _Cache:
    """What transformers' attention needs of a cache, as a function of tensors."""

    is_compileable = False

    def __init__(self, past: Sequence[torch.Tensor]) -> None:
        self._past = past
        self.new: list[torch.Tensor] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return int(self._past[0].shape[0])

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the new keys and values, [batch, heads, step, width], and return all of them."""
        place = len(self.new)
        every = []
        for part, past in zip((key, value), self._past[place : place + 2], strict=True):
            self.new.append(part.permute(2, 0, 1, 3))
            every.append(torch.cat([past.permute(1, 2, 0, 3), part], dim=2))
        return every[0], every[1]


def _visible(past_mask: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What each new token may look at, as numbers to add to the scores, [batch, 1, step, all]."""
    past, step = past_mask.shape[1], mask.shape[1]
    present = torch.cat([past_mask, mask], dim=1) > 0
    own = torch.arange(step) + past
    earlier = torch.arange(past + step)[None, :] <= own[:, None]
    lowest = torch.finfo(torch.float32).min
    allowed = present[:, None, None, :] & earlier[None, None]
    return torch.where(allowed, torch.tensor(0.0), torch.tensor(lowest))


def _leave_layers(graph: Graph, architecture: Architecture) -> None:
    """Let what depends on places alone, and is computed once for all layers, belong to none."""
    own = {name for node in graph.nodes for name in node.inputs if architecture.layer_of(name) >= 0}
    inside = dependents(graph, {"input_ids", *own})
    for node in graph.nodes:
        if not inside.intersection(node.outputs):
            node.scope = ""


def _repeat_layers(graph: Graph, model: Model, count: int) -> None:
    """Repeat the second layer and its cache until the graph has ``count`` layers, in place."""
    architecture = model.architecture
    outputs = list(graph.outputs)
    graph.outputs = [port for port in outputs if architecture.layer_of(port.name) < 0]
    last = [port for port in outputs if architecture.layer_of(port.name) == 1]
    parameters = {name: p.detach().numpy() for name, p in model.module.named_parameters()}
    layers = range(2, count)
    ports = {_internal(architecture, n, "past", part) for n in layers for part in PARTS}
    ports.update(tensor.name for tensor in model.adapter)
    replicate_last_layer(graph, architecture, count, parameters, ports)
    graph.outputs = outputs + [
        Port(architecture.in_layer(port.name, layer), port.dtype, port.shape)
        for layer in layers
        for port in last
    ]


def _internal(architecture: Architecture, layer: int, time: str, part: str) -> str:
    """Name of a layer's cache while layers are repeated and dropped, which goes by names."""
    return f"{architecture.layers}.{layer}.{time}.{part}"


def _rename(graph: Graph, names: Mapping[str, str]) -> None:
    for node in graph.nodes:
        node.inputs = tuple(names.get(name, name) for name in node.inputs)
        node.outputs = tuple(names.get(name, name) for name in node.outputs)
    graph.inputs = [Port(names.get(p.name, p.name), p.dtype, p.shape) for p in graph.inputs]
    graph.outputs = [Port(names.get(p.name, p.name), p.dtype, p.shape) for p in graph.outputs]
    shapes: dict[str, Shape] = {names.get(n, n): shape for n, shape in graph.shapes.items()}
    graph.shapes = shapes


def check_decoding_graph(path: Path, probe: Probe) -> float:
    """Read the probe's texts in two parts, and compare what follows them with torch's logits.

    Args:
        path: The graph, beside its weight blobs.
        probe: What torch + PEFT gives for whole texts, padded on the right.

    Raises:
        VerificationError: A relative error above ``TOLERANCE`` or not finite.
    """
    session = open_session(path)
    inputs, names = session.get_inputs(), [port.name for port in session.get_outputs()]
    cache = {
        port.name: np.zeros((0, len(probe.logits), *port.shape[2:]), np.float32)
        for port in inputs
        if port.name.startswith("past.")
    }
    fixed = {"lora_scale": np.asarray(probe.scale, np.float32), **probe.adapter}
    ids, mask = _padded_left(probe)
    middle = ids.shape[1] // 2
    for start, end in ((0, middle), (middle, ids.shape[1])):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, start:end],
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, start:end],
            "past_mask": mask[:, :start],
            **cache,
            **fixed,
        }
        values = session.run(names, {port.name: feeds[port.name] for port in inputs})
        results = dict(zip(names, values, strict=True))
        for name, past in cache.items():
            cache[name] = np.concatenate([past, results[name.replace("past", "new", 1)]])
    last = probe.inputs["attention_mask"].sum(axis=1) - 1
    expected = probe.logits[np.arange(len(last)), last]
    return worst_error({"logits": relative_error(results["logits"], expected)})


def _padded_left(probe: Probe) -> tuple[Array, Array]:
    """Ids and mask of the probe with the padding in front."""
    ids, mask = probe.inputs["input_ids"], probe.inputs["attention_mask"]
    gaps = mask.shape[1] - mask.sum(axis=1, keepdims=True)
    order = (np.arange(mask.shape[1]) - gaps) % mask.shape[1]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
