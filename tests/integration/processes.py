# SPDX-License-Identifier: Apache-2.0
"""A server and devices as processes of their own, as people run them, and words for what they do.

Nothing here sleeps for a fixed time: ``until`` looks again and again, up to a deadline that a
healthy run never comes near.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from lorikit.sdk._store import Identity, Store
from lorikit.server.cli.operator_client import Endpoint, OperatorClient, RunSummary
from lorikit.server.config import RunConfig

PATIENCE_SECONDS = 180.0
"""Longest wait for anything; a loaded machine needs some of it, an idle one none."""

ROOT = Path(__file__).parents[2]

LABELS = ("cold", "warm", "hot")

_T = TypeVar("_T")
Facts = Mapping[str, Any]
"""A line that a process printed."""


def until(look: Callable[[], _T], what: str, *, seconds: float = PATIENCE_SECONDS) -> _T:
    """The first truth that ``look`` returns.

    Raises:
        AssertionError: There was none in time; names ``what`` was waited for.
    """
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"waited {seconds:.0f} seconds in vain for {what}"
        time.sleep(0.02)
    return found


def free_port() -> int:
    """A port that nobody listens on, for a server that comes back on the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def example_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of the tiny model's words; each class prefers words of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = number % len(LABELS)
        words = rng.integers(0, 60, size=int(rng.integers(3, 9)))
        words[: len(words) // 2 + 1] %= 20
        words[: len(words) // 2 + 1] += 20 * label
        rows.append({"text": " ".join(f"w{word}" for word in words), "label": LABELS[label]})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """The rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Process:
    """A process that prints JSON lines; ends with the block it is used in, whatever happened."""

    def __init__(self, command: Sequence[str], log: Path, **options: Any) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.lines: list[Facts] = []
        with log.open("a", encoding="utf-8") as errors:
            self.popen = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, **options
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, kind: str, **facts: object) -> Facts:
        """The first line of that event with those facts; a callable judges a fact by its value."""

        def look() -> Facts | None:
            if found := self.seen(kind, **facts):
                return found[0]
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}: {self.tail()}"
            return None

        return until(look, f"{kind} {facts}: {self.tail()}")

    def seen(self, kind: str, **facts: object) -> list[Facts]:
        """The lines so far of that event with those facts."""
        lines = list(self.lines)
        return [line for line in lines if line.get("event") == kind and _fits(line, facts)]

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self.popen.kill()
        self.wait()

    def wait(self) -> int:
        """Wait for the end; the exit code."""
        try:
            code = self.popen.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end: {self.tail()}") from None
        self._close()
        return code

    def stop(self) -> None:
        """SIGSTOP: it stands still, its connections stay open."""
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it may end in good order."""
        self.popen.send_signal(signal.SIGTERM)

    def text(self) -> str:
        """What it wrote to its error stream, over all its lives."""
        return self.log.read_text(encoding="utf-8")

    def tail(self) -> str:
        return f"{self.lines[-3:]} {self.text()[-1500:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.kill()
        self.popen.wait()
        self._close()

    def _close(self) -> None:
        self._reader.join()
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with contextlib.suppress(ValueError):  # a runtime's own message
                facts = json.loads(line)
                if isinstance(facts, dict):
                    self.lines.append(facts)


def _fits(line: Facts, facts: Mapping[str, object]) -> bool:
    return all(
        name in line and (wanted(line[name]) if callable(wanted) else line[name] == wanted)
        for name, wanted in facts.items()
    )


@dataclass
class Server:
    """``lorikit server`` on a folder and a port that stay the same from start to start."""

    folder: Path
    settings: Mapping[str, float | str] = field(default_factory=dict)
    """More settings, as TOML writes their values."""
    compiled: Path | None = None
    """Folder of packages for a ``compiled_server``; None: ``lorikit server`` compiles them."""
    port: int = field(default_factory=free_port)
    trust: Mapping[str, Any] = field(default_factory=lambda: {"insecure": True})
    """What an operator's ``Endpoint`` has beside the address."""
    process: Process = field(init=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, *, failpoint: str = "") -> Self:
        """Start, and wait until it listens; ``failpoint`` says where it shall kill itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "server.toml"
        settings = {
            "lease_seconds": 20.0,
            "settle_seconds": PATIENCE_SECONDS,
            "retry_seconds": 0.1,
            **self.settings,
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        config.write_text("".join([f'address = "{self.address}"\nfolder = "runs"\n', *lines]))
        self.process = Process(
            self._command(config),
            self.folder / "log.txt",
            cwd=ROOT,
            env=os.environ | {"LORIKIT_FAILPOINT": failpoint, "OMP_NUM_THREADS": "2"},
        )
        self.process.wait_for("listening")
        return self

    def _command(self, config: Path) -> Sequence[str]:
        if self.compiled is None:
            command = ("lorikit.server.cli", "server", "--config", str(config), "--format", "json")
        else:
            command = ("tests.integration.compiled_server", str(config), str(self.compiled))
        return (sys.executable, "-m", *command)

    def restart(self, *, failpoint: str = "") -> None:
        """Start again where a killed server was."""
        assert self.process.wait() == -signal.SIGKILL, self.process.tail()
        self.start(failpoint=failpoint)

    @contextlib.contextmanager
    def operator(self) -> Iterator[OperatorClient]:
        with OperatorClient(Endpoint(address=self.address, **self.trust)) as client:
            yield client

    def create(self, config: RunConfig) -> RunSummary:
        with self.operator() as client:
            return client.create(config.name, config.canonical())

    def report(self, run: str) -> Mapping[str, Any]:
        """The run's report as the server gives it now."""
        with self.operator() as client:
            return client.get(run)[1]

    def ended(self, run: str) -> RunSummary:
        """Wait for the end of a run; the server may not die meanwhile."""

        def look() -> RunSummary | None:
            assert self.process.popen.poll() is None, self.process.tail()
            with self.operator() as client:
                summary, _ = client.get(run)
            return None if summary.state in ("preparing", "running") else summary

        summary = until(look, f"the end of run {run}")
        self.events(run)  # ends when the last report is written
        return summary

    def events(self, run: str) -> list[Facts]:
        """Every event of a run that has ended."""
        with self.operator() as client:
            return [{"event": e.kind, **e.facts} for e in client.watch(run)]

    def run_folder(self, run: str) -> Path:
        return self.folder / "runs" / run

    def held_bytes(self) -> int:
        """Bytes of the updates that are half-way in."""
        uploads = self.folder / "runs" / ".server" / "uploads"
        return sum(path.stat().st_size for path in uploads.glob("*.part"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__()


@dataclass
class Device:
    """``python -m lorikit.sdk`` on a store that stays the same from start to start.

    Its installation has a fixed name, so that two runs on two servers know it as the same device.
    """

    name: str
    address: str
    folder: Path
    rows: Sequence[Mapping[str, str]] = ()
    memory_limit: str = "2GB"
    speed_gflops: float = 10.0
    python: str = sys.executable
    engine: str = "onnx"
    environment: Mapping[str, str] = field(default_factory=dict)
    trust: Sequence[str] = ("--insecure",)
    """Options that say how the server is trusted."""
    largest_file_bytes: int | None = None
    """Limit that the system puts on the size of any file; writing beyond it fails."""
    process: Process = field(init=False)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def prepare(self) -> Self:
        """Give the installation its name, and write its rows."""
        if not (self.store / "identity").exists():
            with Store(self.store) as store:
                store.save_identity(Identity(installation_id=f"installation-{self.name}"))
        write_rows(self.folder / "rows.jsonl", self.rows)
        return self

    def start(self, **changes: str) -> Self:
        """Start, or start again; returns at once."""
        self.prepare()
        command = [
            *(self.python, "-m", "lorikit.sdk", *self.trust, "--format", "json"),
            *("--server", changes.get("address", self.address)),
            *("--data", str(self.folder / "rows.jsonl"), "--store", str(self.store)),
            *("--device-class", self.name, "--memory-limit", self.memory_limit),
            *("--speed-gflops", str(self.speed_gflops), "--engine", self.engine),
            *("--threads", "1", "--log-level", "INFO"),
        ]
        self.process = Process(
            command, self.folder / "log.txt", env=os.environ | dict(self.environment)
        )
        if self.largest_file_bytes is not None:
            limits = (self.largest_file_bytes, self.largest_file_bytes)
            resource.prlimit(self.process.popen.pid, resource.RLIMIT_FSIZE, limits)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "process"):
            self.process.__exit__()


def make_devices(folder: Path, address: str, count: int = 3, **options: Any) -> list[Device]:
    """Devices with rows of their own, none started."""
    return [
        Device(
            name=f"device-{number}",
            address=address,
            folder=folder / f"device-{number}",
            rows=example_rows(24 + 3 * number, seed=number),
            **options,
        )
        for number in range(count)
    ]
