# SPDX-License-Identifier: Apache-2.0
"""The demo from start to end: split, serve, train, compare, report."""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from lorikit.server.cli.operator_client import Endpoint, OperatorClient, RunEvent
from lorikit.server.config import RunConfig
from lorikit.server.demo.comparison import Comparison
from lorikit.server.demo.data import DemoError, lay_out
from lorikit.server.demo.devices import Fleet
from lorikit.server.demo.live import Board, shown
from lorikit.server.demo.server_process import ServerProcess
from lorikit.server.demo.settings import DemoConfig, uniform_run_config
from lorikit.server.demo.summary import complete_report
from lorikit.server.report_html import render

_LOOK_SECONDS = 0.1
_END_SECONDS = 30.0
"""How long devices get to notice that the run has ended."""

_T = TypeVar("_T")


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

    data = lay_out(demo)
    say(
        f"{len(demo.devices)} devices share {data.row_count:,} questions to a voice assistant "
        f"(CLINC150); they will learn {len(data.config.labels)} intents with {demo.method}."
    )
    uniform = None
    with ServerProcess(demo.folder / "server") as server:
        say(f"Server listens on {server.address}; it compiles {demo.model_name} now.")
        main = _federate(demo, data.config, server, console)
        if demo.with_baselines:
            say("Baseline: FedIT with the smallest rank on every device.")
            uniform = _federate(demo, uniform_run_config(data.config), server, console).report
    comparison = Comparison(demo, data, main.report)
    report = complete_report(
        comparison.measured_in_full(say),
        devices=demo.devices,
        names=main.names,
        supervised=main.fleet.supervised,
        torch_step=comparison.torch_step(say),
        baselines=comparison.baselines(uniform, say) if uniform else {},
    )
    _write_results(demo.folder, data.config, report)
    return DemoResult(report=report, folder=demo.folder)


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


def _write_results(folder: Path, config: RunConfig, report: Mapping[str, Any]) -> None:
    """Put report.json, report.html and the adapter where a newcomer looks for them."""
    (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    shutil.copytree(folder / "server" / config.name / "adapter", folder / "adapter")
