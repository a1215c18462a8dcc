# SPDX-License-Identifier: Apache-2.0
"""What a package's graphs take and give, checked before the runtime sees an array."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorikit.proto.manifest import Graph, Manifest
from lorikit.proto.tensors import Array, Tensors
from lorikit.sdk._errors import ForeignAdapterError, PackageError
from lorikit.sdk.engines.base import Batch

BATCH_INPUTS = ("input_ids", "attention_mask", "pixel_values", "labels", "weights")
"""Graph inputs that come from the batch."""

WHOLE_NUMBERS = frozenset({"input_ids", "attention_mask", "labels"})
"""Those of them that are int64; the others are float32."""

GRADIENT_SUFFIX = ".grad"
"""What the output with a trained tensor's gradient adds to its name."""


DROPOUT_SEED = "dropout_seed"
"""Graph input that says which elements are dropped: int64, drawn anew for each micro-batch."""


def scalar_inputs(manifest: Manifest, graph: Graph) -> tuple[str, ...]:
    """Inputs of the graph that the plan must give a number for."""
    known = {*BATCH_INPUTS, DROPOUT_SEED, *(tensor.name for tensor in manifest.adapter)}
    return tuple(name for name in graph.inputs if name not in known)


def trained_tensors(manifest: Manifest) -> tuple[str, ...]:
    """Names of the tensors that the training graph gives a gradient for."""
    return tuple(tensor.name for tensor in manifest.adapter if tensor.trained)


def check_adapter(manifest: Manifest, adapter: Tensors) -> None:
    """Check that an adapter has every tensor of the manifest, in a shape that fits.

    The rank of a module is whatever its tensors have, but all of them must agree on it.

    Raises:
        ForeignAdapterError: A tensor is missing, of the wrong element type or shape; names it.
    """
    ranks: dict[str, int] = {}
    for tensor in manifest.adapter:
        value = adapter.get(tensor.name)
        if value is None:
            raise ForeignAdapterError(f"adapter lacks tensor {tensor.name}")
        if value.dtype != np.float32:
            raise ForeignAdapterError(f"adapter tensor {tensor.name} is {value.dtype}, not float32")
        fits = len(value.shape) == len(tensor.shape)
        for have, want in zip(value.shape, tensor.shape, strict=False):
            if want == "rank":
                want = ranks.setdefault(tensor.module, have)
            fits = fits and have == want
        if not fits:
            rank = f" with rank {ranks[tensor.module]}" if tensor.module in ranks else ""
            raise ForeignAdapterError(
                f"adapter tensor {tensor.name} has shape {value.shape}, the package needs "
                f"{tensor.shape}{rank}"
            )


def feeds(
    graph: Graph, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]
) -> dict[str, Array]:
    """The arrays of one run, for the inputs that the graph lists and no others.

    Raises:
        PackageError: The graph lists an input that is in none of the three; names it.
    """
    return {name: _feed(name, adapter, batch, inputs) for name in graph.inputs}


def _feed(name: str, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Array:
    if name in batch.inputs:
        return batch.inputs[name]
    if name == "labels":
        return batch.labels
    if name == "weights":
        return batch.weights
    if name in adapter:
        return np.ascontiguousarray(adapter[name])
    if name in inputs:
        return np.asarray(inputs[name], np.int64 if name == DROPOUT_SEED else np.float32)
    raise PackageError(f"the graph needs input {name!r}, which neither adapter nor plan gives")
