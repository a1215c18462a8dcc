# SPDX-License-Identifier: Apache-2.0
"""Lays out the demo's folder: rows for each device, rows to measure with, the model by its name."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorikit.server.config import RunConfig
from lorikit.server.demo.clinc150 import Row, in_scope_rows, intents
from lorikit.server.demo.devices import write_rows
from lorikit.server.demo.settings import CONCENTRATION, DemoConfig, run_config
from lorikit.server.demo.split import dirichlet_split
from lorikit.server.errors import LorikitError

MARKER = ".lorikit-demo"
"""File that says that a folder holds a demo, so that the next demo may take its place."""


class DemoError(LorikitError):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoData:
    """What lies ready when the demo starts."""

    config: RunConfig
    """Settings of its run."""
    row_count: int
    """Training rows, all devices together."""
    train: Path
    """All training rows, for the baselines."""
    test: Path


def lay_out(demo: DemoConfig) -> DemoData:
    """Write everything the demo starts from into its folder.

    Raises:
        DemoError: The folder holds something that is no demo.
    """
    prepare_folder(demo.folder)
    rows = first_of_each_intent(in_scope_rows("train"), demo.rows_per_intent)
    for name, own in zip(demo.devices, deal(rows, demo), strict=True):
        write_rows(device_folder(demo, name) / "rows.jsonl", own)
    train, test = (demo.folder / "data" / f"{part}.jsonl" for part in ("train", "test"))
    write_rows(train, rows)
    write_rows(test, in_scope_rows("test"))
    config = run_config(demo, model=_named_model(demo), labels=intents(rows), evaluation_data=test)
    return DemoData(config=config, row_count=len(rows), train=train, test=test)


def device_folder(demo: DemoConfig, name: str) -> Path:
    """Where a device keeps its rows, its store and its log."""
    return demo.folder / "devices" / name


def deal(rows: Sequence[Row], demo: DemoConfig) -> list[list[Row]]:
    """The rows of each device, by domain in random proportions, in random order."""
    parts = dirichlet_split(
        [row["domain"] for row in rows],
        devices=len(demo.devices),
        concentration=CONCENTRATION,
        seed=demo.seed,
        smallest=2 * demo.batch_size,
    )
    rng = np.random.default_rng(demo.seed)
    return [[rows[index] for index in rng.permutation(part)] for part in parts]


def first_of_each_intent(rows: Sequence[Row], count: int) -> tuple[Row, ...]:
    """The first rows of every intent, in their order; all rows if ``count`` is 0."""
    taken: Counter[str] = Counter()
    kept = []
    for row in rows:
        taken[row["intent"]] += 1
        if not count or taken[row["intent"]] <= count:
            kept.append(row)
    return tuple(kept)


def prepare_folder(folder: Path) -> None:
    """Make the folder, or empty it if it holds an earlier demo.

    Raises:
        DemoError: It holds something else.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise DemoError(
                f"{folder} is not empty and holds no earlier demo; choose another --folder"
            )
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _named_model(demo: DemoConfig) -> Path:
    """The model's folder, under its name where the system has links."""
    link = demo.folder / "data" / demo.model_name
    try:
        link.symlink_to(demo.model.absolute(), target_is_directory=True)
    except (
        OSError
    ):  # Windows allows links to few users; the name in the report is then the folder's
        return demo.model
    return link
