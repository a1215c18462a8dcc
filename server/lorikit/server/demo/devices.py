# SPDX-License-Identifier: Apache-2.0
"""The demo's devices: one process each, as a device app would be, watched from outside."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lorikit.server.demo.clinc150 import Row
from lorikit.server.demo.processes import peak_memory, resident_memory
from lorikit.server.demo.settings import DemoClass

STOP_SECONDS = 10.0
"""How long a process gets to end by itself before it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEvent:
    """A line that a device printed."""

    device: str
    """Name of the device in the demo."""
    facts: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Supervised:
    """What was seen of one process from outside."""

    limit_bytes: int
    peak_bytes: int = 0
    """The kernel's own high-water mark, at the last look."""
    resident_bytes: int = 0
    was_killed: bool = False
    """Whether the supervisor ended it for going over its limit."""


@dataclass(slots=True)
class _Device:
    process: subprocess.Popen[str]
    reader: threading.Thread
    log: IO[str]


@dataclass(slots=True, kw_only=True)
class Fleet:
    """All device processes; ``stop`` ends them, whatever happened."""

    server: str
    """Address of the server."""
    folder: Path
    """Each device keeps its rows, its store and its log in a folder of its own below it."""
    events: queue.Queue[DeviceEvent] = field(default_factory=queue.Queue)
    supervised: dict[str, Supervised] = field(default_factory=dict)
    _devices: dict[str, _Device] = field(default_factory=dict)

    def start(self, name: str, kind: DemoClass) -> None:
        """Start one device; its rows must have been written."""
        own = self.folder / name
        log = (own / "log.txt").open("a", encoding="utf-8")
        process = subprocess.Popen(
            device_command(self.server, own, kind),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is ours to hand on, once
        )
        reader = threading.Thread(target=self._read, args=(name, process), daemon=True)
        seen = self.supervised.setdefault(name, Supervised(limit_bytes=kind.memory_limit_bytes))
        seen.was_killed = False
        self._devices[name] = _Device(process, reader, log)
        reader.start()

    def supervise(self) -> None:
        """Look at the memory of every process, and kill those over their limit."""
        for name, device in self._devices.items():
            if device.process.poll() is not None:
                continue
            seen = self.supervised[name]
            seen.resident_bytes = resident_memory(device.process.pid)
            seen.peak_bytes = max(seen.peak_bytes, peak_memory(device.process.pid))
            if seen.resident_bytes > seen.limit_bytes:
                seen.was_killed = True
                device.process.kill()

    def exit_codes(self) -> dict[str, int]:
        """Exit codes of the devices that have ended."""
        codes = ((name, device.process.poll()) for name, device in self._devices.items())
        return {name: code for name, code in codes if code is not None}

    @property
    def has_ended(self) -> bool:
        """Whether no device runs any more."""
        return len(self.exit_codes()) == len(self._devices)

    def stop(self) -> None:
        """End every process: politely, then by force."""
        running = [d for d in self._devices.values() if d.process.poll() is None]
        for device in running:
            device.process.send_signal(signal.SIGTERM)
        for device in self._devices.values():
            end_process(device.process)
            device.reader.join(STOP_SECONDS)
            device.log.close()
            if device.process.stdout is not None:
                device.process.stdout.close()
        self._devices.clear()

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                facts = json.loads(line)
            except ValueError:  # a runtime's own message on standard output
                continue
            if isinstance(facts, dict):
                self.events.put(DeviceEvent(device=name, facts=facts))


def device_command(server: str, folder: Path, kind: DemoClass) -> Sequence[str]:
    """The command line of one device."""
    return (
        sys.executable,
        "-m",
        "lorikit.sdk",
        "--server",
        server,
        "--insecure",
        "--data",
        str(folder / "rows.jsonl"),
        "--store",
        str(folder / "store"),
        "--memory-limit",
        str(kind.memory_limit_bytes),
        "--device-class",
        kind.name,
        "--speed-gflops",
        str(kind.speed_gflops),
        "--threads",
        "1",
        "--format",
        "json",
    )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, text and intent only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"text": row["text"], "intent": row["intent"]}) + "\n")


def end_process(process: subprocess.Popen[str]) -> None:
    """Wait for a process that was asked to end, and kill it if it does not."""
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
