# SPDX-License-Identifier: Apache-2.0
"""What the server measures of a classifier, on which rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorikit.server.config import EvaluationData, RunConfig
from lorikit.server.plans import seed_of


def evaluation_rows(
    data: EvaluationData, config: RunConfig, *, most: int = 0
) -> tuple[list[str], list[int]]:
    """The rows to measure with, the same in every round.

    Args:
        data: All rows.
        config: Settings of the run.
        most: Largest number of rows; 0 for ``evaluate_rows``.
    """
    count = len(data.texts)
    wanted = most or config.evaluate_rows
    rows = list(range(count))
    if 0 < wanted < count:
        rng = np.random.default_rng(seed_of("evaluate", config.seed))
        rows = sorted(rng.choice(count, size=wanted, replace=False).tolist())
    return [data.texts[row] for row in rows], [data.labels[row] for row in rows]


def accuracy_and_loss(logits: npt.NDArray[np.float32], labels: Sequence[int]) -> dict[str, float]:
    """Accuracy and mean cross-entropy."""
    scores = logits.astype(np.float64)
    truth = np.asarray(labels)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    losses = log_sums - shifted[np.arange(len(truth)), truth]
    return {
        "accuracy": float((scores.argmax(axis=1) == truth).mean()),
        "loss": float(losses.mean()),
    }
