# SPDX-License-Identifier: Apache-2.0
"""What the baselines are asked to do: the federation's work, for one machine with all the data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lorikit.server.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineTask:
    """The work of the federation, as one machine with all the data would do it."""

    model: str
    """Hugging Face folder of an encoder."""
    train: str
    """JSON lines file of all training rows."""
    test: str
    """JSON lines file of the test rows."""
    text_column: str
    label_column: str
    labels: tuple[str, ...]
    targets: tuple[str, ...]
    """Modules that get LoRA; empty for the usual ones of the model."""
    """Modules that get LoRA."""
    rank: int
    scale: float
    """LoRA scale s = alpha / rank."""
    learning_rate: float
    head_factor: float = 1.0
    """Learning rate of the head, in units of ``learning_rate``."""
    batch_size: int
    max_length: int
    examples: int
    """Examples the federation saw, all devices and rounds together, with repetition."""
    head_start: Mapping[str, Any] | None
    """Options of the head start from the frozen features, see ``HeadStartConfig``; None for none.
    The number of examples is left out: here all are in one place."""
    seconds: float
    """Most time the training may take; it ends early, and says so, when that is over."""
    seed: int

    @classmethod
    def like(
        cls,
        config: RunConfig,
        report: Mapping[str, Any],
        *,
        train: Path,
        test: Path,
        seconds: float,
    ) -> Self:
        """The same work as a finished run.

        Args:
            config: Settings of the run.
            report: Its report; says how many examples the devices saw.
            train: All training rows.
            test: The test rows.
            seconds: Most time the training may take.
        """
        entries = [entry for one in report["rounds"] for entry in one["devices"]]
        trained = [entry for entry in entries if entry["trained_layers"]]
        return cls(
            model=str(config.model),
            train=str(train),
            test=str(test),
            text_column=config.text_column,
            label_column=config.label_column,
            labels=config.labels,
            targets=config.targets,
            rank=config.max_rank,
            scale=config.lora_scale,
            learning_rate=config.optimizer.learning_rate,
            head_factor=config.learning_rate_factors.get("head", 1.0),
            batch_size=config.batch_size,
            max_length=config.max_length,
            examples=sum(entry["examples"] for entry in trained),
            head_start=_head_start(config),
            seconds=seconds,
            seed=config.seed,
        )

    def to_json(self) -> str:
        """The task as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The task that ``to_json`` wrote."""
        fields = json.loads(text)
        return cls(
            **{**fields, "labels": tuple(fields["labels"]), "targets": tuple(fields["targets"])}
        )


def _head_start(config: RunConfig) -> Mapping[str, Any] | None:
    if config.head_start == "none":
        return None
    options = config.head_start_options.items()
    return {name: value for name, value in options if name != "max_examples"}
