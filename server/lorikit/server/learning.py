# SPDX-License-Identifier: Apache-2.0
"""What devices' measured peaks teach the predictions of later runs.

A run plans with what was known when it began, however often the server is restarted meanwhile, so
that its plans follow from its settings and its devices alone.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorikit.server.planner.corrections import MemoryCorrections

logger = logging.getLogger(__name__)

_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Observation:
    """A peak that was predicted and measured."""

    device_class: str
    predicted_bytes: float
    """Without correction."""
    measured_bytes: float


class LearntMemory:
    """Corrections by device class in a folder of the server."""

    def __init__(self, folder: Path) -> None:
        """Use a folder; it is made where it is missing."""
        self._folder = folder
        self._path = folder / "corrections.json"

    def for_run(self, name: str) -> MemoryCorrections:
        """What was known when the run of that name was first opened."""
        path = self._folder / f"run-{name}.json"
        with _LOCK:
            if not path.is_file():
                self._write(path, self._read(self._path))
            return self._read(path)

    def teach(self, observations: Iterable[Observation]) -> None:
        """Learn from a run's reports, for the runs that begin after it."""
        with _LOCK:
            known = self._read(self._path)
            for observation in observations:
                known.observe(
                    observation.device_class,
                    predicted_bytes=observation.predicted_bytes,
                    measured_bytes=observation.measured_bytes,
                )
            self._write(self._path, known)

    def _read(self, path: Path) -> MemoryCorrections:
        """The corrections in a file; none where it is missing or cannot be read."""
        try:
            return MemoryCorrections.from_json(path.read_text())
        except FileNotFoundError:
            return MemoryCorrections()
        except ValueError as error:
            logger.warning("memory corrections start anew: %s: %s", path, error)
            return MemoryCorrections()

    def _write(self, path: Path, known: MemoryCorrections) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        with os.fdopen(handle, "w") as file:
            file.write(known.to_json())
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
