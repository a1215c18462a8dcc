# SPDX-License-Identifier: Apache-2.0
"""A run as its events tell it: folded into a state, and shown as tables or lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorikit.server.cli.display import megabytes
from lorikit.server.cli.operator_client import RunEvent

_ENDED = frozenset({"finished", "stopped", "failed"})
_ROUNDS_SHOWN = 12


@dataclass(slots=True, kw_only=True)
class DeviceView:
    """One device as far as the events have told."""

    device: str
    device_class: str = ""
    state: str = "joined"
    round: int | None = None
    precision: str = ""
    rank: int = 0
    layers: int = 0
    micro_batch: int = 0
    memory_bytes: int = 0
    """Peak resident memory, measured."""
    predicted_bytes: int = 0
    bytes_up: int = 0
    """Over all rounds."""
    step: str = ""
    """Steps done and to do, where somebody close to the device knows."""
    loss: float | None = None


@dataclass(slots=True, kw_only=True)
class RoundView:
    """One round as far as the events have told."""

    number: int
    state: str = ""
    tasks: int = 0
    updates: int = 0
    accuracy: float | None = None
    loss: float | None = None
    start: float = 0.0
    end: float = 0.0


@dataclass(slots=True)
class RunView:
    """State of a run; ``apply`` each event in order."""

    rounds_planned: int = 0
    state: str = "preparing"
    message: str = ""
    devices: dict[str, DeviceView] = field(default_factory=dict)
    rounds: dict[int, RoundView] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _ENDED

    def apply(self, event: RunEvent) -> str | None:
        """Take an event in; returns a line for people, or None where it is not worth one."""
        facts = event.facts
        match event.kind:
            case "state":
                return self._state(facts)
            case "device":
                return self._device(facts)
            case "round":
                return self._round(facts, event.time)
            case "task":
                return self._task(facts)
            case "update":
                return self._update(facts)
            case "evaluation":
                return self._evaluation(facts)
        return None

    def render(self) -> RenderableType:
        """The devices, the rounds, and how the run stands."""
        heading = Text(f"Run is {self.state}", style="bold")
        if self.message:
            heading.append(f": {self.message}", style="red")
        return Group(heading, self._device_table(), self._round_table())

    def _state(self, facts: Mapping[str, Any]) -> str | None:
        self.state = str(facts.get("state", self.state))
        self.message = str(facts.get("message") or facts.get("reason") or "")
        return f"run is {self.state}" + (f": {self.message}" if self.message else "")

    def _device(self, facts: Mapping[str, Any]) -> str:
        device = self._known(facts)
        device.state = str(facts.get("state", device.state))
        if device.state == "refused":
            return f"device {device.device} refused: {facts.get('reason')} {facts.get('remedy')}"
        return f"device {device.device} ({device.device_class or 'no class'}) {device.state}"

    def _round(self, facts: Mapping[str, Any], time: float) -> str | None:
        number = int(facts["round"])
        entry = self.rounds.setdefault(number, RoundView(number=number))
        entry.state = str(facts.get("state", ""))
        if entry.state == "training":
            entry.start = entry.start or time
        if entry.state != "closed":
            return f"round {number + 1}: {entry.state}"
        entry.end = time
        accuracy = "" if entry.accuracy is None else f", accuracy {100 * entry.accuracy:.1f} %"
        return f"round {number + 1} done: {entry.updates} updates{accuracy}"

    def _task(self, facts: Mapping[str, Any]) -> str | None:
        device = self._known(facts)
        number = int(facts["round"])
        entry = self.rounds.setdefault(number, RoundView(number=number))
        state = str(facts.get("state", ""))
        if state == "open":
            device.round = number
            device.state = "working"
            device.step, device.loss = "", None
            device.precision = str(facts.get("precision", device.precision))
            device.rank = int(facts.get("rank", device.rank))
            device.layers = len(facts.get("trained_layers", ()))
            device.micro_batch = int(facts.get("micro_batch", device.micro_batch))
            device.predicted_bytes = int(facts.get("predicted_peak_memory_bytes", 0))
            entry.tasks += 1
            return None
        device.state = state
        if state in ("failed", "rejected"):
            return f"device {device.device} {state} in round {number + 1}: {facts.get('message')}"
        return None

    def _update(self, facts: Mapping[str, Any]) -> str | None:
        device = self._known(facts)
        report = facts.get("report") or {}
        device.memory_bytes = max(device.memory_bytes, int(report.get("peak_memory_bytes") or 0))
        device.bytes_up += int(facts.get("bytes_up") or 0)
        device.rank = int(report.get("rank") or device.rank)
        if report.get("last_loss"):
            device.loss = float(report["last_loss"])
        device.state = "done"
        number = int(facts["round"])
        self.rounds.setdefault(number, RoundView(number=number)).updates += 1
        return None

    def _evaluation(self, facts: Mapping[str, Any]) -> str | None:
        if facts.get("source") != "server":
            return None
        number = int(facts["round"])
        entry = self.rounds.setdefault(number, RoundView(number=number))
        entry.accuracy = _number(facts, "accuracy", "metric")
        entry.loss = _number(facts, "loss")
        return None

    def _known(self, facts: Mapping[str, Any]) -> DeviceView:
        name = str(facts["device"])
        device = self.devices.setdefault(name, DeviceView(device=name))
        device.device_class = str(facts.get("class") or device.device_class)
        return device

    def _device_table(self) -> Table:
        table = Table(header_style="bold", box=None, pad_edge=False)
        columns = ("device", "class", "state", "base")
        for column in columns:
            table.add_column(column, no_wrap=True)
        for column in ("round", "rank", "layers", "step", "loss", "memory", "predicted", "sent"):
            table.add_column(column, justify="right", no_wrap=True)
        for device in sorted(self.devices.values(), key=_by_class):
            table.add_row(*_device_cells(device))
        return table

    def _round_table(self) -> Table:
        table = Table(header_style="bold", box=None, pad_edge=False)
        for column in ("round", "updates", "accuracy", "loss", "seconds", "state"):
            table.add_column(column, justify="left" if column == "state" else "right")
        shown = sorted(self.rounds.values(), key=lambda entry: entry.number)[-_ROUNDS_SHOWN:]
        for entry in shown:
            table.add_row(*_round_cells(entry, self.rounds_planned))
        return table


def _device_cells(device: DeviceView) -> tuple[str, ...]:
    return (
        device.device[:16],
        device.device_class,
        device.state,
        device.precision,
        "" if device.round is None else str(device.round + 1),
        str(device.rank or ""),
        str(device.layers or ""),
        device.step,
        "" if device.loss is None else f"{device.loss:.3f}",
        megabytes(device.memory_bytes),
        megabytes(device.predicted_bytes),
        f"{device.bytes_up / 1e6:.2f} MB",
    )


def _round_cells(entry: RoundView, planned: int) -> tuple[str, ...]:
    seconds = entry.end - entry.start if entry.end and entry.start else 0.0
    return (
        f"{entry.number + 1}/{planned}" if planned else str(entry.number + 1),
        f"{entry.updates}/{entry.tasks}",
        "" if entry.accuracy is None else f"{100 * entry.accuracy:.1f} %",
        "" if entry.loss is None else f"{entry.loss:.3f}",
        f"{seconds:.1f}" if seconds else "",
        entry.state,
    )


def _by_class(device: DeviceView) -> tuple[str, str]:
    return (device.device_class, device.device)


def _number(facts: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        if facts.get(name) is not None:
            return float(facts[name])
    return None
