# SPDX-License-Identifier: Apache-2.0
"""The demo's server: the real command, in a process of its own."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from lorikit.server.demo.devices import STOP_SECONDS, end_process
from lorikit.server.errors import LorikitError

START_SECONDS = 120.0
"""Longest time from start to the line that says where the server listens."""


class ServerDiedError(LorikitError):
    """The server process ended before its time; the message has the end of its log."""


class ServerProcess:
    """``lorikit server`` on a free port of this machine; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started before the context is entered.

        Args:
            folder: The server's folder; its log is ``log.txt`` there.
        """
        self.folder = folder
        self.address = ""
        self._lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / "log.txt").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            (
                *(sys.executable, "-m", "lorikit.server.cli", "server"),
                *("--address", "localhost:0", "--folder", str(self.folder)),
                *("--insecure", "--format", "json"),
            ),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is the demo's to hand on, once
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.address = self._listening()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def check(self) -> None:
        """Nothing, while the server runs; raises ``ServerDiedError`` otherwise."""
        code = self._process.poll()
        if code is not None:
            raise ServerDiedError(f"the server ended with exit code {code}: {self._last_words()}")

    def _listening(self) -> str:
        """Wait for the line that says where the server listens."""
        for _ in range(round(START_SECONDS * 5)):
            try:
                facts = json.loads(self._lines.get(timeout=0.2))
            except queue.Empty:
                self.check()
                continue
            if facts.get("event") == "listening":
                return str(facts["address"])
        raise ServerDiedError(f"the server did not listen within {START_SECONDS:.0f} seconds")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        end_process(self._process)
        self._reader.join(STOP_SECONDS)
        self._log.close()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _last_words(self) -> str:
        lines = (self.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
        return lines[-1] if lines else "its log is empty"
