# SPDX-License-Identifier: Apache-2.0
"""The store in a relational database: SQLite by default, any SQLAlchemy URL.

Each public method is one transaction, durable when it returns. A change of state compares before
it sets, writes its event in the same transaction, and refuses what ``states`` does not allow; so a
step that a crash repeats either happens once or finds that it has happened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.states import (
    ROUND_TRANSITIONS,
    TASK_TRANSITIONS,
    RoundState,
    RunState,
    TaskState,
    check,
)
from lorikit.server.store.database import document
from lorikit.server.store.identity import IdentityStore
from lorikit.server.store.runs import RunStore, find_run
from lorikit.server.store.tables import (
    EvaluationRow,
    RoundRow,
    RunRow,
    TaskRow,
    UpdateRow,
)


class SqlStore(RunStore, IdentityStore):
    """Runs, devices, rounds, tasks, updates, events and identities; safe for several threads."""

    def end_run(self, run_id: str, state: RunState, *, message: str = "") -> None:
        """To finished, stopped or failed; open rounds are abandoned and open tasks void."""
        with self._begin() as session:
            run = find_run(session, run_id)
            run.message, run.ended = message, self._clock()
            for row in session.scalars(select(RoundRow).where(RoundRow.run_id == run.id)).all():
                if RoundState.ABANDONED in ROUND_TRANSITIONS[row.state]:
                    self._move_round(session, row, RoundState.ABANDONED)
            self._expire_tasks(session, run.id)
            self._move_run(session, run, state, message=message)

    def open_round(self, run_id: str, number: int) -> RoundRow:
        """The round of that number, made where it is new."""
        with self._begin() as session:
            known = session.get(RoundRow, (run_id, number))
            if known is not None:
                return known
            row = RoundRow(run_id=run_id, number=number, opened=self._clock())
            session.add(row)
            session.flush()
            self._tell(session, run_id, "round", round=number, state=row.state)
            return row

    def round(self, run_id: str, number: int) -> RoundRow:
        """One round, which must exist."""
        with self._begin() as session:
            return session.get_one(RoundRow, (run_id, number))

    def rounds(self, run_id: str) -> Sequence[RoundRow]:
        """All rounds of a run, by number."""
        query = select(RoundRow).where(RoundRow.run_id == run_id).order_by(RoundRow.number)
        with self._begin() as session:
            return session.scalars(query).all()

    def start_training(self, run_id: str, number: int, tasks: Iterable[TaskRow]) -> RoundRow:
        """From assigning to training: all tasks appear at once."""
        with self._begin() as session:
            row = session.get_one(RoundRow, (run_id, number))
            # A late update may have come while the work was being handed out anew.
            done = {update.device_id for update in _updates(session, run_id, number)}
            count = self._add_tasks(session, (t for t in tasks if t.device_id not in done))
            self._move_round(session, row, RoundState.TRAINING, tasks=count)
            return row

    def reassign(self, run_id: str, number: int, *, reason: str) -> RoundRow:
        """From training back to assigning, for another attempt; updates that are here stay."""
        with self._begin() as session:
            row = session.get_one(RoundRow, (run_id, number))
            row.attempt += 1
            self._move_round(session, row, RoundState.ASSIGNING, reason=reason)
            return row

    def start_aggregating(self, run_id: str, number: int) -> RoundRow:
        """From training to aggregating: the accepted updates are fixed, open tasks are void."""
        with self._begin() as session:
            row = session.get_one(RoundRow, (run_id, number))
            self._expire_tasks(session, run_id, number)
            count = len(_updates(session, run_id, number))
            self._move_round(session, row, RoundState.AGGREGATING, updates=count)
            return row

    def start_evaluating(self, run_id: str, number: int, *, state_digest: str) -> RoundRow:
        """From aggregating to evaluating, with the method's new state."""
        with self._begin() as session:
            row = session.get_one(RoundRow, (run_id, number))
            row.state_digest = state_digest
            self._move_round(session, row, RoundState.EVALUATING)
            return row

    def add_evaluation_tasks(self, tasks: Iterable[TaskRow]) -> None:
        """Add tasks to a round in evaluation; those that are there already stay as they are."""
        with self._begin() as session:
            self._add_tasks(session, tasks)

    def close_round(
        self, run_id: str, number: int, *, metrics: Mapping[str, float] | None, examples: int = 0
    ) -> RoundRow:
        """From evaluating to closed, with what the server measured."""
        with self._begin() as session:
            row = session.get_one(RoundRow, (run_id, number))
            row.ended = self._clock()
            self._expire_tasks(session, run_id, number)
            if metrics is not None:
                self._add_evaluation(session, run_id, number, "server", metrics, examples)
            self._move_round(session, row, RoundState.CLOSED)
            return row

    def task(self, task_id: str) -> TaskRow | None:
        """One task, or None."""
        with self._begin() as session:
            return session.get(TaskRow, task_id)

    def tasks(self, run_id: str, number: int | None = None) -> Sequence[TaskRow]:
        """Tasks of a run or of one round, by round, device and attempt."""
        query = select(TaskRow).where(TaskRow.run_id == run_id)
        if number is not None:
            query = query.where(TaskRow.round == number)
        query = query.order_by(TaskRow.round, TaskRow.device_id, TaskRow.attempt, TaskRow.kind)
        with self._begin() as session:
            return session.scalars(query).all()

    def open_tasks(self, run_id: str, number: int) -> dict[str, str]:
        """Device by open task of a round."""
        query = select(TaskRow.id, TaskRow.device_id).where(
            TaskRow.run_id == run_id, TaskRow.round == number, TaskRow.state == TaskState.OPEN
        )
        with self._begin() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def current_task(self, device_id: str) -> TaskRow | None:
        """What the device should be working on, the same after every restart of either side.

        A task whose lease ended is given back to its device while the round still takes updates and
        has none of that device.
        """
        query = (
            select(TaskRow)
            .join(RunRow, RunRow.id == TaskRow.run_id)
            .where(
                TaskRow.device_id == device_id,
                TaskRow.state.in_((TaskState.OPEN, TaskState.EXPIRED)),
                RunRow.state == RunState.RUNNING,
                RunRow.stop != "at-once",
            )
            .order_by(RunRow.created, TaskRow.attempt.desc())
        )
        with self._begin() as session:
            for task in session.scalars(query):
                if _is_wanted(session, task):
                    if task.state is TaskState.EXPIRED:
                        self._move_task(session, task, TaskState.OPEN)
                    return task
        return None

    def is_wanted(self, task_id: str) -> bool:
        """Whether work on the task still counts; a lease that ended is granted again."""
        with self._begin() as session:
            task = session.get(TaskRow, task_id)
            if task is None or not _is_wanted(session, task):
                return False
            if task.state is TaskState.EXPIRED:
                self._move_task(session, task, TaskState.OPEN)
            return True

    def wanted_tasks(self) -> frozenset[str]:
        """Tasks whose update may still count."""
        query = (
            select(TaskRow.id)
            .join(
                RoundRow, (RoundRow.run_id == TaskRow.run_id) & (RoundRow.number == TaskRow.round)
            )
            .where(
                TaskRow.state.in_((TaskState.OPEN, TaskState.EXPIRED)),
                RoundRow.state.in_((RoundState.ASSIGNING, RoundState.TRAINING)),
            )
        )
        with self._begin() as session:
            return frozenset(session.scalars(query))

    def taken_devices(self, run_id: str, number: int) -> frozenset[str]:
        """Devices that get no other task in this round.

        Those that work, in any run; those that have sent their update; and silent ones, which find
        their task again when they come back.
        """
        working = select(TaskRow.device_id).where(TaskRow.state == TaskState.OPEN)
        taken = select(TaskRow.device_id).where(
            TaskRow.run_id == run_id,
            TaskRow.round == number,
            TaskRow.state.in_((TaskState.DONE, TaskState.EXPIRED)),
        )
        with self._begin() as session:
            return frozenset(session.scalars(working.union(taken)))

    def end_task(
        self, task_id: str, state: TaskState, *, error: str = "", message: str = ""
    ) -> bool:
        """To failed, rejected or expired; False when the task had ended before."""
        with self._begin() as session:
            task = session.get_one(TaskRow, task_id)
            if state not in TASK_TRANSITIONS[task.state]:
                return False
            task.error, task.message = error, message
            self._move_task(session, task, state, error=error, message=message)
            return True

    def update(self, update_id: str) -> UpdateRow | None:
        """The receipt of an update, or None."""
        with self._begin() as session:
            return session.get(UpdateRow, update_id)

    def updates(self, run_id: str, number: int) -> Sequence[UpdateRow]:
        """Accepted updates of a round, by device id."""
        with self._begin() as session:
            return _updates(session, run_id, number)

    def accept_update(
        self, task_id: str, *, digest: str, size: int, examples: int, report: Mapping[str, Any]
    ) -> bool:
        """Count an update whose blob is stored; False when it was counted before.

        Raises:
            RequestError: TASK_UNKNOWN, or ROUND_CLOSED when it can no longer count.
        """
        with self._begin() as session:
            task = session.get(TaskRow, task_id)
            if task is None:
                raise RequestError(ErrorCode.TASK_UNKNOWN, f"no task {task_id}")
            if session.get(UpdateRow, task.update_id) is not None:
                return False
            if not _is_wanted(session, task):
                raise RequestError(ErrorCode.ROUND_CLOSED, f"task {task_id} is {task.state}")
            session.add(
                UpdateRow(
                    update_id=task.update_id,
                    task_id=task.id,
                    run_id=task.run_id,
                    round=task.round,
                    device_id=task.device_id,
                    digest=digest,
                    size=size,
                    examples=examples,
                    report=document(report),
                    received=self._clock(),
                )
            )
            self._move_task(session, task, TaskState.DONE)
            self._expire_tasks(session, task.run_id, task.round, device_id=task.device_id)
            facts = {"round": task.round, "device": task.device_id, "bytes_up": size}
            self._tell(
                session, task.run_id, "update", **facts, **json.loads(task.facts), report=report
            )
            return True

    def accept_evaluation(
        self, task_id: str, *, metrics: Mapping[str, float], examples: int
    ) -> bool:
        """Note what a device measured; False when the task had ended before."""
        with self._begin() as session:
            task = session.get_one(TaskRow, task_id)
            if not _is_wanted(session, task):
                return False
            self._add_evaluation(
                session, task.run_id, task.round, task.device_id, metrics, examples
            )
            if task.kind == "evaluate":
                self._move_task(session, task, TaskState.DONE)
            return True

    def evaluations(self, run_id: str) -> Sequence[EvaluationRow]:
        """All measurements of a run, by round."""
        query = (
            select(EvaluationRow)
            .where(EvaluationRow.run_id == run_id)
            .order_by(EvaluationRow.round, EvaluationRow.source)
        )
        with self._begin() as session:
            return session.scalars(query).all()

    def referenced_digests(self) -> frozenset[str]:
        """States and updates that a run in progress, or the last word of a run, still needs."""
        with self._begin() as session:
            digests = set(session.scalars(select(RunRow.initial_digest)))
            digests |= set(session.scalars(select(RoundRow.state_digest)))
            open_rounds = (
                select(UpdateRow.digest)
                .join(
                    RoundRow,
                    (RoundRow.run_id == UpdateRow.run_id) & (RoundRow.number == UpdateRow.round),
                )
                .where(RoundRow.state.in_([s for s in RoundState if not s.is_over]))
            )
            digests |= set(session.scalars(open_rounds))
        return frozenset(digest for digest in digests if digest)

    def _add_tasks(self, session: Session, tasks: Iterable[TaskRow]) -> int:
        count = 0
        for task in tasks:
            if session.get(TaskRow, task.id) is not None:
                continue
            task.created = self._clock()
            session.add(task)
            session.flush()
            self._tell_task(session, task, **json.loads(task.facts))
            count += 1
        return count

    def _add_evaluation(
        self,
        session: Session,
        run_id: str,
        number: int,
        source: str,
        metrics: Mapping[str, float],
        examples: int,
    ) -> None:
        row = EvaluationRow(
            run_id=run_id,
            round=number,
            source=source,
            metrics=document(metrics),
            examples=examples,
        )
        session.merge(row)
        facts = {"round": number, "source": source, "examples": examples, **metrics}
        self._tell(session, run_id, "evaluation", **facts)

    def _expire_tasks(
        self,
        session: Session,
        run_id: str,
        number: int | None = None,
        *,
        device_id: str | None = None,
    ) -> None:
        query = select(TaskRow).where(TaskRow.run_id == run_id, TaskRow.state == TaskState.OPEN)
        if number is not None:
            query = query.where(TaskRow.round == number)
        if device_id is not None:
            query = query.where(TaskRow.device_id == device_id)
        for task in session.scalars(query).all():
            task.message = "the round went on without this device"
            self._move_task(session, task, TaskState.EXPIRED)

    def _move_round(
        self, session: Session, row: RoundRow, after: RoundState, **facts: object
    ) -> None:
        check(ROUND_TRANSITIONS, row.state, after)
        row.state = after
        self._tell(
            session,
            row.run_id,
            "round",
            round=row.number,
            state=after,
            attempt=row.attempt,
            **facts,
        )

    def _move_task(
        self, session: Session, task: TaskRow, after: TaskState, **facts: object
    ) -> None:
        check(TASK_TRANSITIONS, task.state, after)
        task.state = after
        task.ended = None if after is TaskState.OPEN else self._clock()
        self._tell_task(session, task, **facts)

    def _tell_task(self, session: Session, task: TaskRow, **facts: object) -> None:
        self._tell(
            session,
            task.run_id,
            "task",
            task=task.id,
            round=task.round,
            device=task.device_id,
            work=task.kind,
            state=task.state,
            **facts,
        )


def _updates(session: Session, run_id: str, number: int) -> Sequence[UpdateRow]:
    query = (
        select(UpdateRow)
        .where(UpdateRow.run_id == run_id, UpdateRow.round == number)
        .order_by(UpdateRow.device_id)
    )
    return session.scalars(query).all()


def _is_wanted(session: Session, task: TaskRow) -> bool:
    """Whether a result of the task would count now."""
    if task.state not in (TaskState.OPEN, TaskState.EXPIRED):
        return False
    run = session.get_one(RunRow, task.run_id)
    row = session.get_one(RoundRow, (task.run_id, task.round))
    if run.state is not RunState.RUNNING or run.stop == "at-once":
        return False
    if task.kind == "evaluate":
        return row.state is RoundState.EVALUATING
    # While work is handed out anew, updates of the earlier attempt still count.
    if row.state not in (RoundState.TRAINING, RoundState.ASSIGNING):
        return False
    counted = select(UpdateRow.update_id).where(
        UpdateRow.run_id == task.run_id,
        UpdateRow.round == task.round,
        UpdateRow.device_id == task.device_id,
    )
    return session.scalar(counted) is None
