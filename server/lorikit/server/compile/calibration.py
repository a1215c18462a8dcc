# SPDX-License-Identifier: Apache-2.0
"""What LoRA modules read: second moments of their inputs, and the bases that read them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from lorikit.proto.tensors import Array, Float32, Tensors
from lorikit.server.aggregate.base_error import whitening
from lorikit.server.aggregate.product import Float64
from lorikit.server.compile.base import Base
from lorikit.server.compile.graph import Graph, Port
from lorikit.server.compile.models import Model
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.compile.package import Variant, prediction_graph, with_base

logger = logging.getLogger(__name__)

BATCHES, ROWS, TOKENS = 8, 8, 16
"""Size of the synthetic calibration set: 1024 tokens, or 64 images."""

MOST_BYTES = 512 << 20
"""Moments larger than this together are not kept: errors then count alike for all inputs."""

Batch = Mapping[str, Array]
"""What the model reads, by name."""


def synthetic_batches(model: Model, *, seed: int = 0) -> Iterator[Batch]:
    """Inputs that need no data: uniformly random tokens, or noise for images.

    Args:
        model: Says what it reads.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    for _ in range(BATCHES):
        if "pixel_values" in model.kind.inputs:
            size = model.config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            shape = (ROWS, model.config.num_channels, height, width)
            yield {"pixel_values": rng.normal(0, 1, shape).astype(np.float32)}
        else:
            ids = rng.integers(1, int(model.config.vocab_size), (ROWS, TOKENS))
            yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def input_moments(
    forward: Graph,
    model: Model,
    base: Base,
    batches: Iterator[Batch],
    *,
    adapter: Tensors,
    folder: Path,
) -> dict[str, Float64]:
    """X X^T of every LoRA module's inputs, of the exact model, [d_in, d_in].

    Modules that read the same value share one matrix.

    Args:
        forward: Forward graph of all layers.
        model: Knows the adapter.
        base: The exact one.
        batches: Calibration inputs.
        adapter: Start values, of which B is zero, and everything else the graph reads.
        folder: Of the base's blobs, where the graph is written for a moment.

    Returns:
        Moments by module; empty where all together would exceed ``MOST_BYTES``.
    """
    every = tuple(range(model.layer_count))
    exact = Variant(precision=base.precision, lowest_trained_layer=0, kept_layers=every)
    graph = prediction_graph(forward, model, exact)
    read = _values_read(graph, model)
    widths = {value: int(graph.shape(value)[-1]) for value in set(read.values())}
    if (needed := sum(8 * width * width for width in widths.values())) > MOST_BYTES:
        logger.warning("moments of %d bytes are not kept; all inputs count alike", needed)
        return {}
    names = sorted(widths)
    graph.outputs = [Port(n, np.dtype(np.float32), graph.shape(n)) for n in names]
    graph, _ = with_base(graph, base, exact)
    session = _opened(graph, folder)
    wanted = {port.name for port in session.get_inputs()}
    fixed = {"lora_scale": np.asarray(1.0, np.float32), **adapter}
    moments = {name: np.zeros((widths[name], widths[name])) for name in names}
    for batch in batches:
        feeds = {n: v for n, v in {**fixed, **batch}.items() if n in wanted}
        for name, value in zip(names, session.run(names, feeds), strict=True):
            flat = value.reshape(-1, value.shape[-1]).astype(np.float64)
            moments[name] += flat.T @ flat
    return {module: moments[value] for module, value in read.items()}


class QuantizedBases:
    """A run's base at its precisions, for corrections; made when first asked."""

    def __init__(
        self,
        *,
        digest: str,
        precisions: tuple[str, ...],
        weights: Callable[[str], Float32],
        stored: Callable[[str, str], Float32],
        moments: Callable[[], Mapping[str, Float64]],
    ) -> None:
        """Bind where things come from.

        Args:
            digest: Of the base model's weights.
            precisions: That devices may hold.
            weights: W of a LoRA module.
            stored: Q(W) of a precision and a module.
            moments: Second moments by module; called once.
        """
        self.digest = digest
        self.precisions = precisions
        self.weights = weights
        self._stored = stored
        self._moments = moments
        self._roots: dict[str, Float64] | None = None

    def error(self, precision: str, module: str) -> Float32:
        """E = Q(W) - W, [d_out, d_in]."""
        return self._stored(precision, module) - self.weights(module)

    def input_root(self, module: str) -> Float64 | None:
        """S with S S^T the damped moments of what the module reads; None where not kept."""
        if self._roots is None:
            moments = self._moments()
            made = {id(each): whitening(each) for each in moments.values()}
            self._roots = {name: made[id(each)] for name, each in moments.items()}
        return self._roots.get(module)


def _values_read(graph: Graph, model: Model) -> dict[str, str]:
    """The value that each LoRA module's factor A is multiplied with."""
    modules = {t.name: t.module for t in model.adapter if t.role == "lora_A"}
    return {
        modules[node.inputs[1]]: node.inputs[0]
        for node in graph.nodes
        if len(node.inputs) > 1 and node.inputs[1] in modules
    }


def _opened(graph: Graph, folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibration-", suffix=".onnx") as file:
        file.write(to_onnx(graph).SerializeToString(deterministic=True))
        file.flush()
        return onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
