# SPDX-License-Identifier: Apache-2.0
"""``report.json``: what happened in a run, for machines. Fields are only ever added."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorikit.server.config import RunConfig
from lorikit.server.report_drift import read_drift
from lorikit.server.report_html import render
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import EvaluationRow, RoundRow, RunRow, TaskRow, UpdateRow

REPORT_FILE = "report.json"
"""Its name in the folder of a run."""

PAGE_FILE = "report.html"
"""Name of the page that shows it to people; it opens without a network."""


def build_report(store: SqlStore, run_id: str, folder: Path | None = None) -> dict[str, Any]:
    """The report of a run so far, from the store and, where given, what is in the run's folder."""
    run = store.run(run_id)
    config = RunConfig.model_validate_json(run.config)
    evaluations = store.evaluations(run.id)
    rounds = [
        _round(
            row,
            store.tasks(run.id, row.number),
            {update.task_id: update for update in store.updates(run.id, row.number)},
            [e for e in evaluations if e.round == row.number],
            read_drift(folder, row.number) if folder else [],
        )
        for row in store.rounds(run.id)
    ]
    measured = [row["metric"] for row in rounds if row["metric"] is not None]
    return {
        "name": run.name,
        "run": run.id,
        "state": run.state,
        "message": run.message,
        "method": config.method,
        "model": config.model.name,
        "task": config.task.kind,
        "labels": len(config.labels),
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "seconds": _seconds(run),
        "rounds": rounds,
        "baselines": {},
        "final_metric": measured[-1] if measured else None,
    }


def written_state(folder: Path) -> str | None:
    """The run's state as the report in its folder has it; None without a report."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder / REPORT_FILE).read_bytes())["state"])
    return None


def write_report(folder: Path, store: SqlStore, run_id: str) -> None:
    """Write the report for machines and its page for people, each in one step.

    A reader sees the old file or the new one, never a half. Baselines that somebody added to the
    file stay. The page comes first, since ``written_state`` reads the other.
    """
    path = folder / REPORT_FILE
    report = build_report(store, run_id, folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        report["baselines"] = json.loads(path.read_bytes())["baselines"]
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / PAGE_FILE, render(report))
    _replace(path, json.dumps(report, indent=2))


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=".report-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _round(
    row: RoundRow,
    tasks: Iterable[TaskRow],
    updates: Mapping[str, UpdateRow],
    evaluations: Iterable[EvaluationRow],
    drift: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    measured = {e.source: json.loads(e.metrics) for e in evaluations}
    server = measured.pop("server", {})
    devices = [_device(task, updates.get(task.id)) for task in tasks if task.kind == "train"]
    return {
        "round": row.number,
        "state": row.state,
        "attempts": row.attempt + 1,
        "metric": server.get("accuracy"),
        "loss": server.get("loss"),
        "seconds": None if row.ended is None else row.ended - row.opened,
        "bytes_up": sum(device["bytes_up"] for device in devices),
        "bytes_down": sum(device["bytes_down"] for device in devices),
        "devices": devices,
        "device_metrics": measured,
        "drift": drift,
    }


def _device(task: TaskRow, update: UpdateRow | None) -> dict[str, Any]:
    facts = json.loads(task.facts)
    report = json.loads(update.report) if update else {}
    return {
        "device": task.device_id,
        "class": facts["class"],
        "engine": report.get("engine", ""),
        "precision": facts["precision"],
        "rank": report.get("rank") or facts["rank"],
        "assigned_rank": facts["rank"],
        "trained_layers": facts["trained_layers"],
        "kept_layers": facts["kept_layers"],
        "micro_batch": facts["micro_batch"],
        "peak_memory_bytes": report.get("peak_memory_bytes"),
        "anonymous_memory_bytes": report.get("anonymous_memory_bytes"),
        "predicted_peak_memory_bytes": facts["predicted_peak_memory_bytes"],
        "seconds": report.get("training_seconds"),
        "download_seconds": report.get("download_seconds"),
        "bytes_up": update.size if update else 0,
        "bytes_down": report.get("bytes_down", 0),
        "examples": report.get("examples", 0),
        "dataset_size": update.examples if update else 0,
        "steps": report.get("steps", 0),
        "first_loss": report.get("first_loss"),
        "last_loss": report.get("last_loss"),
        "accuracy": report.get("accuracy"),
        "status": task.state,
        "error": task.error,
        "message": task.message,
    }


def _seconds(run: RunRow) -> float | None:
    return None if run.ended is None else run.ended - run.created
