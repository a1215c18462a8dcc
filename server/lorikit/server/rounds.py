# SPDX-License-Identifier: Apache-2.0
"""The life of a run, round by round, as an explicit state machine.

``states`` says what may follow what, ``work`` does the heavy part of each state, the store keeps
every state before the next begins. This module only waits and decides; killed anywhere, it starts
again from what the store says.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Concatenate, ParamSpec

from sqlalchemy.exc import OperationalError

from lorikit.proto.status import ErrorCode
from lorikit.server.config import RunConfig, ServerConfig
from lorikit.server.errors import LorikitError, RequestError
from lorikit.server.failpoints import Reach, unreached
from lorikit.server.methods.base import Participant
from lorikit.server.offload import Offload
from lorikit.server.report import write_report
from lorikit.server.signals import Signals
from lorikit.server.states import RoundState, RunState, TaskState
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import RoundRow, TaskRow
from lorikit.server.tasks import TaskBoard, run_key
from lorikit.server.uploads import Uploads
from lorikit.server.work import RoundWork

logger = logging.getLogger(__name__)

_LONGEST_PAUSE = 60.0

_P = ParamSpec("_P")


class RoundFailedError(LorikitError):
    """A round cannot get the updates it needs; the message says what happened on the devices."""


class RunLoop:
    """One run from preparing to its end."""

    def __init__(
        self,
        run_id: str,
        config: RunConfig,
        open_work: Callable[[], RoundWork],
        *,
        store: SqlStore,
        board: TaskBoard,
        uploads: Uploads,
        signals: Signals,
        offload: Offload,
        server: ServerConfig,
        clock: Callable[[], float] = time.monotonic,
        reach: Reach = unreached,
    ) -> None:
        """Bind the parts; ``open_work`` loads model, method and planner, and may take minutes."""
        self._run_id = run_id
        self._config = config
        self._open_work = open_work
        self._store = store
        self._board = board
        self._uploads = uploads
        self._signals = signals
        self._offload = offload
        self._server = server
        self._clock = clock
        self._reach = reach
        self._key = run_key(run_id)
        self._started = clock()
        self._stop = ""

    def stop(self, how: str) -> None:
        """End the run ``after-round`` or ``at-once``."""
        self._stop = how
        self._signals.notify(self._key)

    async def run(self) -> None:
        """Go on from the state in the store until the run has ended."""
        try:
            work = await self._offload.work(self._open_work)
            await self._keep_going(self._run, work)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever ends a run is told to the operator, with its cause
            logger.exception("run failed run=%s", self._run_id)
            await self._end(RunState.FAILED, f"{type(error).__name__}: {error}"[:2000])

    async def _keep_going(
        self, step: Callable[[RoundWork], Awaitable[None]], work: RoundWork
    ) -> None:
        """Repeat a step while what stops it may pass: a full disk, a locked database."""
        pause = self._server.retry_seconds
        while True:
            try:
                await step(work)
                return
            except (OSError, OperationalError, RequestError) as error:
                if not _may_pass(error):
                    raise
                logger.error("run waits run=%s: %s", self._run_id, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _run(self, work: RoundWork) -> None:
        run = await self._offload.database(self._store.run, self._run_id)
        self._stop = self._stop or run.stop
        if run.state is RunState.PREPARING:
            digest = await self._offload.work(work.first_state)
            self._reach(f"storing.{RunState.RUNNING}")
            await self._offload.database(self._store.start_run, self._run_id, initial_digest=digest)
            self._reach(f"run.{RunState.RUNNING}")
        try:
            for number in range(await self._first_open_round(), self._config.rounds):
                await self._round(work, number)
                if self._stop:
                    break
        except _StoppedAtOnceError:
            logger.info("run stopped at once run=%s", self._run_id)
        await self._finish(work)

    async def _first_open_round(self) -> int:
        rounds = await self._offload.database(self._store.rounds, self._run_id)
        return sum(row.state is RoundState.CLOSED for row in rounds)

    async def _round(self, work: RoundWork, number: int) -> None:
        row = await self._enter(RoundState.ASSIGNING, self._store.open_round, number)
        steps = {
            RoundState.ASSIGNING: self._assign,
            RoundState.TRAINING: self._train,
            RoundState.AGGREGATING: self._aggregate,
            RoundState.EVALUATING: self._evaluate,
        }
        while not row.state.is_over:
            logger.info("round run=%s round=%d state=%s", self._run_id, number, row.state)
            row = await steps[row.state](work, row)
        await self._uploads.forget()
        await self._board.forget_progress()
        if not self._config.keep_updates:
            await self._offload.work(work.forget_updates, number)
        await self._write_report()

    async def _assign(self, work: RoundWork, row: RoundRow) -> RoundRow:
        """Hand out work, as soon as enough devices are there that can do it."""
        while True:
            seen = self._signals.version(self._key)
            self._check_stop()
            open_tasks = await self._open_tasks(row)
            if row.attempt and await self._updates(row) >= self._config.needed_updates:
                return await self._start_training(row, [])  # late ones made it complete
            devices = await self._candidates(work, row)
            if len(devices) >= self._needed_devices(row) or (row.attempt and open_tasks):
                tasks = await self._offload.work(work.assign, row, devices) if devices else []
                self._board.announce(device.device_id for device in devices)
                if tasks or open_tasks:
                    return await self._start_training(row, tasks)
            await self._signals.wait(self._key, seen, self._server.retry_seconds)

    async def _start_training(self, row: RoundRow, tasks: list[TaskRow]) -> RoundRow:
        devices = [task.device_id for task in tasks]
        after = await self._enter(
            RoundState.TRAINING, self._store.start_training, row.number, tasks
        )
        self._board.announce(devices)
        return after

    async def _train(self, work: RoundWork, row: RoundRow) -> RoundRow:
        """Wait for updates until all are here, or the deadline passes with enough of them."""
        deadline = self._clock() + self._config.deadline_seconds
        while True:
            seen = self._signals.version(self._key)
            self._check_stop()
            open_tasks = await self._open_tasks(row)
            left = deadline - self._clock()
            if not open_tasks or left <= 0:
                break
            await self._signals.wait(self._key, seen, min(left, self._server.lease_seconds / 4))
        updates = await self._updates(row)
        if updates >= self._config.needed_updates:
            return await self._enter(
                RoundState.AGGREGATING, self._store.start_aggregating, row.number
            )
        return await self._try_again(row, updates)

    async def _updates(self, row: RoundRow) -> int:
        return len(await self._offload.database(self._store.updates, self._run_id, row.number))

    async def _try_again(self, row: RoundRow, updates: int) -> RoundRow:
        """Another attempt for a round that has too few updates."""
        reason = f"{updates} of {self._config.needed_updates} needed updates"
        if row.attempt + 1 >= self._config.max_attempts:
            causes = await self._offload.database(self._causes, row)
            raise RoundFailedError(
                f"round {row.number} got {reason} in {row.attempt + 1} attempts; {causes}"
            )
        await self._pause(min(self._server.retry_seconds * 2**row.attempt, _LONGEST_PAUSE))
        return await self._enter(
            RoundState.ASSIGNING, self._store.reassign, row.number, reason=reason
        )

    async def _aggregate(self, work: RoundWork, row: RoundRow) -> RoundRow:
        digest = await self._offload.work(work.aggregate, row.number)
        return await self._enter(
            RoundState.EVALUATING, self._store.start_evaluating, row.number, state_digest=digest
        )

    async def _evaluate(self, work: RoundWork, row: RoundRow) -> RoundRow:
        if self._config.evaluate_on_devices:
            await self._evaluate_on_devices(work, row)
        await self._offload.work(work.export, row.number)
        is_last = row.number + 1 == self._config.rounds or bool(self._stop)
        metrics, examples = None, 0
        if work.is_measured(row.number, is_last=is_last):
            metrics, examples = await self._offload.work(work.evaluate, row.number)
        return await self._enter(
            RoundState.CLOSED,
            self._store.close_round,
            row.number,
            metrics=metrics,
            examples=examples,
        )

    async def _enter(
        self,
        state: RoundState,
        change: Callable[Concatenate[str, _P], RoundRow],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> RoundRow:
        """The round after a change that brings it into the state, or leaves it in a later one."""
        self._reach(f"storing.{state}")
        row = await self._offload.database(change, self._run_id, *args, **kwargs)
        self._reach(f"round.{state}")
        return row

    async def _evaluate_on_devices(self, work: RoundWork, row: RoundRow) -> None:
        tasks = await self._offload.work(work.evaluation_tasks, row.number)
        devices = [task.device_id for task in tasks]
        await self._offload.database(self._store.add_evaluation_tasks, tasks)
        self._board.announce(devices)
        deadline = self._clock() + self._config.deadline_seconds
        while self._clock() < deadline and self._stop != "at-once":
            seen = self._signals.version(self._key)
            if not await self._open_tasks(row):
                break
            left = deadline - self._clock()
            await self._signals.wait(self._key, seen, min(left, self._server.lease_seconds / 4))

    async def _finish(self, work: RoundWork) -> None:
        rounds = await self._first_open_round()
        if rounds:
            await self._offload.work(work.export_final, rounds)
            await self._offload.work(work.hand_out, rounds)
        finished = rounds == self._config.rounds
        message = "" if finished else f"stopped by the operator after {rounds} rounds"
        await self._end(RunState.FINISHED if finished else RunState.STOPPED, message)

    async def _end(self, state: RunState, message: str) -> None:
        self._reach(f"storing.{state}")
        await self._offload.database(self._store.end_run, self._run_id, state, message=message)
        self._reach(f"run.{state}")
        await self._uploads.forget()
        await self._write_report()
        self._signals.notify_all()

    async def _write_report(self) -> None:
        folder = self._server.run_folder(self._config.name)
        await self._offload.work(write_report, folder, self._store, self._run_id)
        self._signals.notify(self._key)

    async def _candidates(self, work: RoundWork, row: RoundRow) -> list[Participant]:
        """Present devices that fit, are free, and have not done their part, by device id."""
        if not await self._is_settled(row):
            return []
        taken = await self._offload.database(self._store.taken_devices, self._run_id, row.number)
        free = self._board.present() - taken
        if not free:
            return []
        state = await self._offload.work(work.state_before, row.number)
        fitting, refused = await self._offload.work(work.consider, state, free)
        self._board.announce(refused)
        return fitting

    async def _is_settled(self, row: RoundRow) -> bool:
        """Whether the devices known before this start of the server had time to come back."""
        if row.number == 0 or self._clock() - self._started >= self._server.settle_seconds:
            return True
        members = await self._offload.database(self._store.members, self._run_id)
        able = {device.id for member, device in members if member.refused_reason is None}
        return able <= self._board.heard()

    def _needed_devices(self, row: RoundRow) -> int:
        if row.attempt:
            return 1
        return self._config.needed_updates if row.number else self._config.min_devices

    async def _open_tasks(self, row: RoundRow) -> int:
        """Tasks of the round that somebody works on; leases of silent devices end here."""
        tasks = await self._offload.database(self._store.open_tasks, self._run_id, row.number)
        return len(tasks) - await self._board.expire(tasks)

    def _causes(self, row: RoundRow) -> str:
        tasks = self._store.tasks(self._run_id, row.number)
        causes = [
            f"{task.device_id[:8]} {task.state}: {task.error} {task.message}".rstrip(": ")
            for task in tasks
            if task.state is not TaskState.DONE
        ]
        return "; ".join(causes[-5:]) or "no device took the work"

    async def _pause(self, seconds: float) -> None:
        end = self._clock() + seconds
        while (left := end - self._clock()) > 0:
            self._check_stop()
            await self._signals.wait(self._key, self._signals.version(self._key), left)

    def _check_stop(self) -> None:
        if self._stop == "at-once":
            raise _StoppedAtOnceError


class _StoppedAtOnceError(LorikitError):
    """Leaves the round in progress."""


def _may_pass(error: Exception) -> bool:
    if isinstance(error, RequestError):
        return error.code is ErrorCode.STORAGE_FULL
    if isinstance(error, OperationalError):
        return True
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
