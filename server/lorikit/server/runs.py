# SPDX-License-Identifier: Apache-2.0
"""The runs of a server: starting, going on after a restart, stopping, and what they left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorikit.proto.status import ErrorCode
from lorikit.server.config import RunConfig, ServerConfig, parse_run_config
from lorikit.server.errors import RequestError
from lorikit.server.offload import Offload
from lorikit.server.report import build_report, write_report, written_state
from lorikit.server.rounds import RunLoop
from lorikit.server.signals import Signals
from lorikit.server.states import RoundState, RunState
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import EventRow, RunRow
from lorikit.server.tasks import TaskBoard, run_key

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Where a run stands."""

    run_id: str
    name: str
    method: str
    state: RunState
    round: int
    """Rounds closed."""
    rounds: int
    metric: float
    """Last measured accuracy; NaN before the first."""
    message: str


class Runs:
    """All runs of a server."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        store: SqlStore,
        board: TaskBoard,
        signals: Signals,
        offload: Offload,
        check: Callable[[RunConfig], None],
        open_loop: Callable[[RunRow, RunConfig], RunLoop],
    ) -> None:
        """Bind the parts.

        Args:
            config: The server's settings.
            store: Where runs are kept.
            board: Devices that wait for work.
            signals: What runs wait for.
            offload: Threads.
            check: Raises ``RequestError`` where a run's settings cannot work on this machine.
            open_loop: Makes the loop of a run; cheap.
        """
        self._config = config
        self._store = store
        self._board = board
        self._signals = signals
        self._offload = offload
        self._check = check
        self._open_loop = open_loop
        self._loops: dict[str, RunLoop] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def resume(self) -> int:
        """Go on with the runs that the last server left; how many."""
        active = await self._offload.database(self._store.runs, active_only=True)
        for run in active:
            self._start(run, parse_run_config(run.config))
        await self._offload.database(self._complete_reports)
        return len(active)

    async def create(self, config: RunConfig) -> Summary:
        """Start a run; the same name and settings again give the run that exists.

        Raises:
            RequestError: CONFIG_INVALID, or RUN_EXISTS when the name has other settings.
        """
        await self._offload.file(self._check, config)
        run_id = uuid.uuid4().hex
        run = await self._offload.database(
            self._store.create_run, run_id, config.name, config.canonical()
        )
        if run.id == run_id:
            self._start(run, config)
            self._signals.notify_all()
        return await self.summary(run.id)

    async def every(self) -> list[Summary]:
        """All runs, the oldest first."""
        return await self._offload.database(
            lambda: [self._summary(run) for run in self._store.runs()]
        )

    async def summary(self, name_or_id: str) -> Summary:
        """Where one run stands."""
        return await self._offload.database(lambda: self._summary(self._store.run(name_or_id)))

    async def report(self, name_or_id: str) -> dict[str, Any]:
        """The run's report so far, with what its devices are doing now."""
        run = await self._offload.database(self._store.run, name_or_id)
        report = await self._offload.database(build_report, self._store, run.id)
        progress = self._board.progress()
        tasks = await self._offload.database(self._store.tasks, run.id)
        report["working"] = [
            {
                "device": task.device_id,
                "round": task.round,
                "state": now.state,
                "step": now.step,
                "steps": now.steps,
            }
            for task in tasks
            if (now := progress.get(task.id)) is not None
        ]
        return report

    async def watch(self, name_or_id: str, from_sequence: int) -> AsyncIterator[EventRow]:
        """Events of a run from a sequence number on, until it has ended and its report is there."""
        run = await self._offload.database(self._store.run, name_or_id)
        following = from_sequence
        while True:
            seen = self._signals.version(run_key(run.id))
            state = (await self._offload.database(self._store.run, run.id)).state
            events = await self._offload.database(
                self._store.events, run.id, from_sequence=following
            )
            for event in events:
                yield event
                following = event.sequence + 1
            if not events and not state.is_active and self._is_idle(run.id):
                return
            if not events:
                await self._signals.wait(run_key(run.id), seen, _WATCH_SECONDS)

    def _is_idle(self, run_id: str) -> bool:
        """Whether nothing is done for the run any more."""
        return run_id not in self._tasks or self._tasks[run_id].done()

    async def stop(self, name_or_id: str, *, at_once: bool) -> Summary:
        """End a run after the round in progress, or at once."""
        run = await self._offload.database(self._store.request_stop, name_or_id, at_once=at_once)
        if run.id in self._loops and run.stop:
            self._loops[run.id].stop(run.stop)
        return await self.summary(run.id)

    async def ended(self, name_or_id: str) -> Summary:
        """Wait until the run has ended; where it stands then."""
        run = await self._offload.database(self._store.run, name_or_id)
        task = self._tasks.get(run.id)
        if task is not None:
            await asyncio.wait([task])
        return await self.summary(run.id)

    async def adapters(self, name_or_id: str) -> dict[str, Path]:
        """Exported adapter folders by name, for example ``round-0003/rank-8``, ``final/rank-8``."""
        run = await self._offload.database(self._store.run, name_or_id)
        return await self._offload.file(adapter_folders, self._config.run_folder(run.name))

    async def adapter_files(self, name_or_id: str, name: str) -> list[Path]:
        """The files of an exported adapter, by name.

        Raises:
            RequestError: ADAPTER_UNKNOWN.
        """
        folder = (await self.adapters(name_or_id)).get(name)
        if folder is None:
            raise RequestError(ErrorCode.ADAPTER_UNKNOWN, f"no adapter {name[:80]!r}")
        return sorted(path for path in folder.iterdir() if path.is_file())

    async def close(self) -> None:
        """Leave all loops where they are; the store knows how to go on."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _complete_reports(self) -> None:
        """Write the last report of runs whose end was the last thing a killed server stored."""
        for run in self._store.runs():
            folder = self._config.run_folder(run.name)
            if not run.state.is_active and written_state(folder) != run.state:
                write_report(folder, self._store, run.id)

    def _start(self, run: RunRow, config: RunConfig) -> None:
        loop = self._open_loop(run, config)
        if run.stop:
            loop.stop(run.stop)
        self._loops[run.id] = loop
        self._tasks[run.id] = asyncio.create_task(loop.run(), name=f"run-{run.name}")

    def _summary(self, run: RunRow) -> Summary:
        config = RunConfig.model_validate_json(run.config)
        closed = sum(row.state is RoundState.CLOSED for row in self._store.rounds(run.id))
        metrics = [
            json.loads(row.metrics).get("accuracy", math.nan)
            for row in self._store.evaluations(run.id)
            if row.source == "server"
        ]
        return Summary(
            run_id=run.id,
            name=run.name,
            method=config.method,
            state=run.state,
            round=closed,
            rounds=config.rounds,
            metric=metrics[-1] if metrics else math.nan,
            message=run.message,
        )


def adapter_folders(folder: Path) -> dict[str, Path]:
    """Adapter folders of a run by name."""
    rounds = {f"{path.parent.name}/{path.name}": path for path in folder.glob("adapters/*/rank-*")}
    final = {f"final/{path.name}": path for path in folder.glob("adapter/rank-*")}
    return {name: path for name, path in sorted({**rounds, **final}.items()) if path.is_dir()}
