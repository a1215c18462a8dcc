# SPDX-License-Identifier: Apache-2.0
"""What every engine does: gradients of one micro-batch, and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import Manifest
from lorikit.proto.tensors import Array, Tensors


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples as the model reads them; texts are padded to the longest of them."""

    inputs: Mapping[str, Array]
    """The model's own inputs by name: ``input_ids`` and ``attention_mask`` (1 for tokens, 0 for
    padding), int64 [batch, length], or ``pixel_values``, float32 [batch, channels, height, width].
    """
    labels: npt.NDArray[np.int64]
    """Class per example, [batch], or per token, [batch, length]."""
    weights: npt.NDArray[np.float32]
    """Weight of each label's loss, in the shape of ``labels``; their sum over a step is 1."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """Result of one micro-batch."""

    loss: float
    """Sum over the examples of weight times loss."""
    correct: float
    """Labels of positive weight that are their row's largest logit."""
    gradients: Tensors
    """Gradient of ``loss`` by trained tensor, in the tensor's shape."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of a forward pass that ends in the loss."""

    loss: float
    """Sum over the labels of weight times loss."""
    correct: float
    """As in ``Gradients``."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Result of a forward pass."""

    logits: npt.NDArray[np.float32]
    """[batch, classes], or [batch, length, classes] where tokens are labelled."""
    features: npt.NDArray[np.float32]
    """Input of the task head, [batch, width]."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Result of continuing texts by the next token."""

    logits: npt.NDArray[np.float32]
    """Of the token after the last one given, [batch, vocabulary]."""
    new: Mapping[str, Array]
    """The given tokens' part of the cache by ``<layer>.key`` and ``<layer>.value``, float32 [step,
    batch, heads, width]."""


class Engine(Protocol):
    """An opened package. Engines are not thread-safe; one belongs to one executor."""

    def gradients(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Gradients:
        """Loss and gradients of one micro-batch.

        Args:
            adapter: Every adapter tensor of the manifest, float32.
            batch: One micro-batch.
            inputs: The plan's scalar inputs, for example ``lora_scale``.

        Raises:
            PackageError: An adapter tensor is missing or of the wrong shape.
            OutOfMemoryError: The runtime could not get the memory.
        """
        ...

    def loss(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Evaluation:
        """Loss of one micro-batch, without gradients.

        Runs the package's graph ``evaluate``, whose memory is that of a forward pass, or where it
        has none the training graph. Arguments and errors are those of ``gradients``.
        """
        ...

    def predict(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Predictions:
        """Logits and features; ``labels`` and ``weights`` of the batch are not looked at."""
        ...

    def decode(
        self, adapter: Tensors, tokens: Mapping[str, Array], inputs: Mapping[str, float]
    ) -> Decoded:
        """Logits of the token that follows, from the tokens given and a cache of earlier ones.

        Args:
            adapter: Every adapter tensor of the manifest, float32.
            tokens: ``input_ids``, ``attention_mask`` and ``position_ids``, int64 [batch, step],
                padded on the left; ``past_mask``, int64 [batch, past]; and what ``Decoded.new``
                gave for all earlier tokens, as ``past.<layer>.key`` and ``past.<layer>.value``,
                float32 [past, batch, heads, width]. Past may be 0.
            inputs: The plan's scalar inputs.

        Raises:
            UnsupportedPackageError: The package has no graph ``decode``.
        """
        ...

    def close(self) -> None:
        """Release the runtime's memory; the engine cannot be used any more."""
        ...


class EngineType(Protocol):
    """How an engine is opened."""

    def __call__(self, manifest: Manifest, folder: Path, *, threads: int) -> Engine:
        """Open a package.

        Args:
            manifest: The package.
            folder: Flat folder that holds its blobs, each named by its digest.
            threads: Processor threads to use; at least 1.
        """
        ...
