# SPDX-License-Identifier: Apache-2.0
"""What the demo shows while it runs: a table that moves on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from lorikit.server.cli.operator_client import RunEvent
from lorikit.server.cli.run_view import DeviceView, RunView
from lorikit.server.demo.devices import DeviceEvent, Supervised


class Board:
    """All that is known of a run, from the server, from the devices and from outside them."""

    def __init__(self, classes: Mapping[str, str], rounds: int) -> None:
        """Args are each device's class by the device's name, and the rounds planned."""
        self.view = RunView(rounds_planned=rounds)
        self.names: dict[str, str] = {}
        """The demo's name by the server's identity of a device."""
        self._tasks: dict[str, str] = {}
        self._pending: dict[str, str] = {}
        self._started = time.monotonic()
        self._classes = classes
        self._local: dict[str, DeviceView] = {
            name: DeviceView(device=name, device_class=kind, state="starting")
            for name, kind in classes.items()
        }

    def from_server(self, event: RunEvent) -> str | None:
        """Take in an event of the run; returns a line for people, or None."""
        line = self.view.apply(event)
        if event.kind == "task" and event.facts.get("state") == "open":
            self._tasks[str(event.facts["task"])] = str(event.facts["device"])
            self._match()
        for identity, name in self.names.items():
            line = line.replace(identity, name) if line else None
        return line

    def from_device(self, event: DeviceEvent) -> str | None:
        """Take in a line of a device; returns a line for people, or None."""
        facts = event.facts
        own = self._local[event.device]
        match facts.get("event"):
            case "StateChanged":
                own.state = str(facts["state"])
            case "TaskStarted":
                self._pending[event.device] = str(facts["task_id"])
                self._match()
            case "Progress":
                own.step = f"{facts['step']}/{facts['steps']}"
                own.loss = _as_float(facts.get("loss"))
            case "RoundDone":
                own.step = ""
            case "Error" | "Failed":
                return f"{event.device}: {facts.get('error')}: {facts.get('message')}"
            case "Refused":
                return f"{event.device} refused: {facts.get('reason')} {facts.get('remedy')}"
        return None

    def from_outside(self, seen: Mapping[str, Supervised]) -> None:
        """Take in what the supervisor saw."""
        for name, supervised in seen.items():
            own = self._local[name]
            own.memory_bytes = supervised.peak_bytes
            if supervised.was_killed:
                own.state = "killed (over budget)"

    def render(self) -> RenderableType:
        """The table as it stands."""
        self._merge()
        seconds = time.monotonic() - self._started
        heading = Text(f"{seconds // 60:.0f}:{seconds % 60:02.0f}  ", style="dim")
        shown = RunView(
            rounds_planned=self.view.rounds_planned,
            state=self.view.state,
            message=self.view.message,
            devices=self._local,
            rounds=self.view.rounds,
        )
        return Group(heading, shown.render())

    def _merge(self) -> None:
        """Bring what only the server knows of a device to what the device itself said."""
        for identity, name in self.names.items():
            known, own = self.view.devices.get(identity), self._local[name]
            if known is not None:
                own.round, own.precision, own.rank = known.round, known.precision, known.rank
                own.layers, own.micro_batch = known.layers, known.micro_batch
                own.predicted_bytes, own.bytes_up = known.predicted_bytes, known.bytes_up

    def _match(self) -> None:
        """Learn which of the server's devices is which of ours, by the tasks they work on."""
        for name, task in self._pending.items():
            if task in self._tasks:
                self.names[self._tasks[task]] = name


@contextmanager
def shown(board: Board, console: Console) -> Iterator[Callable[[str | None], None]]:
    """Show a board; gives the function to call with each line, or None for no more than a look."""
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False, highlight=False) if line else None
        return
    with Live(get_renderable=board.render, console=console, refresh_per_second=4):
        yield lambda line: None


def _as_float(value: Any) -> float | None:  # noqa: ANN401  # a number from JSON
    return None if value is None else float(value)
