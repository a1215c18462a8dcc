# SPDX-License-Identifier: Apache-2.0
"""The demo from start to end: split, serve, train, compare, report."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from lorikit.server.cli.operator_client import Endpoint, OperatorClient, RunEvent
from lorikit.server.config import RunConfig
from lorikit.server.demo.baseline_task import BaselineTask
from lorikit.server.demo.clinc150 import Row, in_scope_rows, intents
from lorikit.server.demo.devices import Fleet, write_rows
from lorikit.server.demo.live import Board, shown
from lorikit.server.demo.server_process import ServerProcess
from lorikit.server.demo.settings import (
    CONCENTRATION,
    DemoConfig,
    run_config,
    uniform_run_config,
)
from lorikit.server.demo.split import dirichlet_split
from lorikit.server.demo.summary import complete_report
from lorikit.server.errors import LorikitError
from lorikit.server.report_html import render

MARKER = ".lorikit-demo"
"""File that says that a folder holds a demo, so that the next demo may take its place."""

_LOOK_SECONDS = 0.1
_END_SECONDS = 30.0
"""How long devices get to notice that the run has ended."""

TORCH_STEP_QUOTED: Mapping[str, Any] = {
    "peak_memory_bytes": 555_000_000,
    "label": "1 × 32 tokens, NF4",
    "note": "one step of 1 × 32 tokens, NF4 base, measured on two x86-64 cores",
    "measured": False,
}
"""What the torch stack takes where it is not measured anew."""


_T = TypeVar("_T")


class DemoError(LorikitError):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Where a finished demo left its results."""

    report: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Federation:
    """One run that has ended."""

    report: Mapping[str, Any]
    names: Mapping[str, str]
    fleet: Fleet


def run_demo(demo: DemoConfig, console: Console) -> DemoResult:
    """Run the demo in its folder.

    Raises:
        DemoError: The folder is in use for something else, or the run failed.
        ServerDiedError: The server process ended.
    """

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    prepare_folder(demo.folder)
    train = first_of_each_intent(in_scope_rows("train"), demo.rows_per_intent)
    test = in_scope_rows("test")
    devices = demo.devices
    for name, rows in zip(devices, deal(train, demo), strict=True):
        write_rows(demo.folder / "devices" / name / "rows.jsonl", rows)
    write_rows(demo.folder / "data" / "train.jsonl", train)
    write_rows(demo.folder / "data" / "test.jsonl", test)
    say(
        f"{len(devices)} devices share {len(train):,} questions to a voice assistant (CLINC150); "
        f"they will learn {len(intents(train))} intents with {demo.method}."
    )
    config = run_config(
        demo,
        model=_named_model(demo),
        labels=intents(train),
        evaluation_data=demo.folder / "data" / "test.jsonl",
    )
    with ServerProcess(demo.folder / "server") as server:
        say(f"Server listens on {server.address}; it compiles {demo.model_name} now.")
        main = _federate(demo, config, server, console)
        baselines: dict[str, Any] = {}
        if demo.with_baselines:
            say("Baseline: FedIT with the smallest rank on every device.")
            uniform = _federate(demo, uniform_run_config(config), server, console)
            baselines["uniform"] = _uniform_baseline(uniform.report, config.min_rank)
    if demo.with_baselines:
        say("Baselines: linear probe, and LoRA in one place (torch + PEFT).")
        baselines = _central_baselines(demo, config, main.report) | baselines
    report = complete_report(
        main.report,
        devices=devices,
        names=main.names,
        supervised=main.fleet.supervised,
        torch_step=_torch_step(demo, len(config.labels))
        if demo.measures_torch
        else TORCH_STEP_QUOTED,
        baselines=baselines,
    )
    _write_results(demo.folder, config, report)
    return DemoResult(report=report, folder=demo.folder)


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


def _federate(
    demo: DemoConfig, config: RunConfig, server: ServerProcess, console: Console
) -> _Federation:
    """One run from its creation to its end, with all devices."""
    endpoint = Endpoint(address=server.address, insecure=True)
    fleet = Fleet(server=server.address, folder=demo.folder / "devices")
    board = Board({name: kind.name for name, kind in demo.devices.items()}, config.rounds)
    with OperatorClient(endpoint) as client:
        run_id = client.create(config.name, config.canonical()).run_id
        events: queue.Queue[RunEvent | Exception] = queue.Queue()
        threading.Thread(target=_watch, args=(client, run_id, events), daemon=True).start()
        try:
            for name, kind in demo.devices.items():
                fleet.start(name, kind)
            with shown(board, console) as show:
                _follow(board, fleet, server, events, show)
        finally:
            fleet.stop()
        summary, report = client.get(run_id)
    if summary.state != "finished":
        raise DemoError(f"the run {summary.state}: {summary.message}; logs are in {demo.folder}")
    return _Federation(report=report, names=dict(board.names), fleet=fleet)


def _watch(client: OperatorClient, run_id: str, events: queue.Queue[RunEvent | Exception]) -> None:
    try:
        for event in client.watch(run_id):
            events.put(event)
    except Exception as error:  # handed to the thread that shows the run, and raised there
        events.put(error)


def _follow(
    board: Board,
    fleet: Fleet,
    server: ServerProcess,
    events: queue.Queue[RunEvent | Exception],
    show: Callable[[str | None], None],
) -> None:
    """Show what happens until the run has ended and the devices have noticed."""
    ended = 0.0
    while not ended or (not fleet.has_ended and time.monotonic() - ended < _END_SECONDS):
        server.check()
        fleet.supervise()
        board.from_outside(fleet.supervised)
        for event in _drain(events):
            if isinstance(event, Exception):
                raise event
            show(board.from_server(event))
        for line in _drain(fleet.events):
            show(board.from_device(line))
        if board.view.has_ended:
            ended = ended or time.monotonic()
        elif fleet.has_ended:
            codes = ", ".join(f"{name}: {code}" for name, code in fleet.exit_codes().items())
            raise DemoError(f"every device ended before the run did (exit codes {codes})")
        time.sleep(_LOOK_SECONDS)


def _drain(source: queue.Queue[_T]) -> list[_T]:
    found: list[_T] = []
    while True:
        try:
            found.append(source.get_nowait())
        except queue.Empty:
            return found


def _uniform_baseline(report: Mapping[str, Any], rank: int) -> dict[str, Any]:
    entries = [entry for one in report["rounds"] for entry in one["devices"]]
    return {
        "name": f"FedIT, rank {rank} for all",
        "metric": report["final_metric"],
        "examples": sum(entry["examples"] for entry in entries if entry["trained_layers"]),
        "seconds": report["seconds"],
        "rounds": [one["metric"] for one in report["rounds"]],
        "note": "the same devices, each with the rank of the smallest; plain averaging",
    }


def _central_baselines(
    demo: DemoConfig, config: RunConfig, report: Mapping[str, Any]
) -> dict[str, Any]:
    """Run the torch baselines in a process of their own."""
    data = demo.folder / "data"
    task = BaselineTask.like(
        config,
        report,
        train=data / "train.jsonl",
        test=data / "test.jsonl",
        seconds=demo.baseline_seconds,
    )
    path = demo.folder / "baselines.json"
    path.write_text(task.to_json(), encoding="utf-8")
    return _json_program(demo, "lorikit.server.demo.baselines", str(path))


def _torch_step(demo: DemoConfig, labels: int) -> dict[str, Any]:
    """Measure what devices would need with torch, in a process of its own."""
    cost = _json_program(
        demo,
        "lorikit.server.demo.torch_step",
        str(demo.model),
        *("--labels", str(labels), "--batch", "1", "--length", str(demo.max_length)),
    )
    label = f"1 × {demo.max_length} tokens, NF4"
    note = f"one step of 1 × {demo.max_length} tokens, NF4 base, measured here"
    return {**cost, "label": label, "note": note, "measured": True}


def _json_program(demo: DemoConfig, module: str, *arguments: str) -> dict[str, Any]:
    """What a program of ours prints, its own messages kept in a log."""
    log = demo.folder / f"{module.rpartition('.')[2]}.log"
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            (sys.executable, "-m", module, *arguments),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    if done.returncode:
        raise DemoError(f"{module} ended with exit code {done.returncode}; see {log}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _write_results(folder: Path, config: RunConfig, report: Mapping[str, Any]) -> None:
    """Put report.json, report.html and the adapter where a newcomer looks for them."""
    (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    shutil.copytree(folder / "server" / config.name / "adapter", folder / "adapter")
