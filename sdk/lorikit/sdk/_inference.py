# SPDX-License-Identifier: Apache-2.0
"""Uses an adapter: class probabilities, and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import Dataset
from lorikit.sdk._errors import CancelledError, NonFiniteError
from lorikit.sdk.engines.base import Engine


def logits_of(
    engine: Engine,
    data: Dataset,
    adapter: Tensors,
    inputs: Mapping[str, float],
    *,
    batch_size: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> npt.NDArray[np.float32]:
    """The logits of all examples, [examples, classes], in the data's order.

    Raises:
        CancelledError: ``cancelled`` turned true between two batches.
        NonFiniteError: A logit is NaN or infinite.
    """
    parts: dict[int, npt.NDArray[np.float32]] = {}
    for indices, batch in data.batches(batch_size):
        if cancelled():
            raise CancelledError("cancelled while predicting")
        logits = engine.predict(adapter, batch, inputs).logits
        parts.update(zip(indices.tolist(), logits, strict=True))
    if not parts:
        return np.zeros((0, 0), np.float32)
    stacked = np.stack([parts[index] for index in range(len(data))])
    if not np.isfinite(stacked).all():
        raise NonFiniteError("logits are not finite; the adapter or the package is broken")
    return stacked


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Logarithms of the class probabilities, [examples, classes]."""
    values = logits.astype(np.float64)
    shifted = values - values.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def measure(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> dict[str, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) over the examples; empty for none."""
    if not len(labels):
        return {}
    own = log_probabilities(logits)[np.arange(len(labels)), labels]
    return {
        "accuracy": float((logits.argmax(axis=1) == labels).mean()),
        "loss": float(-own.mean()),
    }
