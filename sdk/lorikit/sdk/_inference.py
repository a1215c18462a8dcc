# SPDX-License-Identifier: Apache-2.0
"""Uses an adapter without training it: logits of what is labelled, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import Task
from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import Dataset
from lorikit.sdk._errors import CancelledError, NonFiniteError
from lorikit.sdk.engines.base import Engine

LANGUAGE_MODELING = ("masked-language-modeling", "causal-language-modeling")
"""Tasks whose classes are the vocabulary: one example already fills a batch."""

_BATCH_SIZE = 4
_LARGEST_EXPONENT = 700.0
"""exp of it is still a finite number."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """What the model says where one example has labels."""

    example: int
    logits: npt.NDArray[np.float32]
    """[labels, classes]"""


def batch_size(task: Task, most: int = _BATCH_SIZE) -> int:
    """Examples that are looked at together, at most so many."""
    return 1 if task.kind in LANGUAGE_MODELING else max(1, most)


def labelled(
    engine: Engine,
    data: Dataset,
    adapter: Tensors,
    inputs: Mapping[str, float],
    *,
    batch_size: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Labelled]:
    """The logits of every label, example by example, the longest first.

    Raises:
        CancelledError: ``cancelled`` turned true between two batches.
        NonFiniteError: A logit is NaN or infinite.
    """
    for indices, batch in data.batches(batch_size):
        if cancelled():
            raise CancelledError("cancelled while predicting")
        logits = engine.predict(adapter, batch, inputs).logits
        for row, example in enumerate(indices.tolist()):
            counts = np.atleast_1d(batch.weights[row] > 0)
            found = logits[row].reshape(len(counts), -1)[counts]
            if not np.isfinite(found).all():
                raise NonFiniteError("logits are not finite; the adapter or the package is broken")
            yield Labelled(example, found)


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Logarithms of the class probabilities, [rows, classes]."""
    values = logits.astype(np.float64)
    shifted = values - values.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def best(logits: npt.NDArray[np.float32]) -> list[tuple[int, float]]:
    """The most probable class of each row, and its probability."""
    classes = logits.argmax(axis=1)
    chances = np.exp(log_probabilities(logits)[np.arange(len(classes)), classes])
    return list(zip(classes.tolist(), chances.tolist(), strict=True))


def measure(
    engine: Engine,
    task: Task,
    data: Dataset,
    adapter: Tensors,
    inputs: Mapping[str, float],
    *,
    most: int = _BATCH_SIZE,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) over all labels; empty for no examples.

    For language models also the perplexity, exp(mean cross-entropy); of a masked model it is that
    of the hidden tokens, which are the same in every evaluation.

    Args:
        engine: The opened package.
        task: The package's.
        data: The examples.
        adapter: Every adapter tensor.
        inputs: The plan's scalar inputs.
        most: Most examples in a batch.
        cancelled: Asked before each batch.

    Raises:
        CancelledError: ``cancelled`` turned true between two batches.
        NonFiniteError: The loss is NaN or infinite.
    """
    if not len(data):
        return {}
    loss, correct = 0.0, 0.0
    for _, batch in data.batches(batch_size(task, most)):
        if cancelled():
            raise CancelledError("cancelled while evaluating")
        part = engine.loss(adapter, batch, inputs)
        loss += part.loss
        correct += part.correct
    if not math.isfinite(loss):
        raise NonFiniteError("the loss is not finite; the adapter or the package is broken")
    count = int(data.counted(np.arange(len(data))).sum())
    metrics = {"accuracy": correct / count, "loss": loss}
    if task.kind in LANGUAGE_MODELING:
        metrics["perplexity"] = math.exp(min(loss, _LARGEST_EXPONENT))
    return metrics
