# SPDX-License-Identifier: Apache-2.0
"""The store in a relational database: SQLite by default, any SQLAlchemy URL.

Each public method is one transaction, durable when it returns. A change of state compares before
it sets, writes its event in the same transaction, and refuses what ``states`` does not allow; so a
step that a crash repeats either happens once or finds that it has happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, inspect, or_, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import LorikitError, RequestError
from lorikit.server.states import (
    ROUND_TRANSITIONS,
    RUN_TRANSITIONS,
    TASK_TRANSITIONS,
    RoundState,
    RunState,
    TaskState,
    check,
)
from lorikit.server.store.tables import (
    SCHEMA_VERSION,
    DeviceRow,
    EvaluationRow,
    EventRow,
    MemberRow,
    MetaRow,
    RoundRow,
    RunRow,
    Table,
    TaskRow,
    UpdateRow,
)

_ACTIVE = tuple(state for state in RunState if state.is_active)


class StoreError(LorikitError):
    """The database cannot be used; the message says why and what to do."""


class SqlStore:
    """Runs, devices, rounds, tasks, updates and events; safe for several threads."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database and make its tables where there are none.

        Args:
            url: SQLAlchemy URL.
            clock: Seconds since the epoch, for the times in the tables.

        Raises:
            StoreError: The tables are of another version.
        """
        self._clock = clock
        self._engine = _engine(url)
        self._begin = sessionmaker(self._engine, expire_on_commit=False).begin
        self._open()

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def create_run(self, run_id: str, name: str, config: str) -> RunRow:
        """A new run, or the one that has that name and the same settings.

        Raises:
            RequestError: RUN_EXISTS when the name is taken by a run with other settings.
        """
        with self._begin() as session:
            known = session.scalar(select(RunRow).where(RunRow.name == name))
            if known is None:
                run = RunRow(id=run_id, name=name, config=config, created=self._clock())
                session.add(run)
                session.flush()
                self._tell(session, run_id, "state", state=run.state, name=name)
                return run
            if known.config != config:
                raise RequestError(ErrorCode.RUN_EXISTS, f"run {name!r} has other settings")
            return known

    def run(self, name_or_id: str) -> RunRow:
        """One run; raises ``RequestError`` RUN_UNKNOWN."""
        with self._begin() as session:
            return _run(session, name_or_id)

    def runs(self, *, active_only: bool = False) -> Sequence[RunRow]:
        """Runs in the order of their creation."""
        query = select(RunRow).order_by(RunRow.created, RunRow.id)
        if active_only:
            query = query.where(RunRow.state.in_(_ACTIVE))
        with self._begin() as session:
            return session.scalars(query).all()

    def start_run(self, run_id: str, *, initial_digest: str) -> None:
        """From preparing to running, with the method's first state."""
        with self._begin() as session:
            run = _run(session, run_id)
            run.initial_digest = initial_digest
            self._move_run(session, run, RunState.RUNNING)

    def end_run(self, run_id: str, state: RunState, *, message: str = "") -> None:
        """To finished, stopped or failed; open rounds are abandoned and open tasks void."""
        with self._begin() as session:
            run = _run(session, run_id)
            run.message, run.ended = message, self._clock()
            for row in session.scalars(select(RoundRow).where(RoundRow.run_id == run.id)).all():
                if RoundState.ABANDONED in ROUND_TRANSITIONS[row.state]:
                    self._move_round(session, row, RoundState.ABANDONED)
            self._expire_tasks(session, run.id)
            self._move_run(session, run, state, message=message)

    def request_stop(self, name_or_id: str, *, at_once: bool) -> RunRow:
        """Note that the run is to end; nothing for a run that has ended."""
        with self._begin() as session:
            run = _run(session, name_or_id)
            if run.state.is_active and run.stop != "at-once":
                run.stop = "at-once" if at_once else "after-round"
                self._tell(session, run.id, "state", state=run.state, stop=run.stop)
            return run

    def enrol(
        self,
        device_id: str,
        *,
        installation_id: str,
        token_hash: str,
        profile: str,
        max_devices: int,
    ) -> DeviceRow:
        """The device of that installation, made where it is new, with a new secret.

        Raises:
            RequestError: SERVER_BUSY when ``max_devices`` are enrolled already.
        """
        with self._begin() as session:
            query = select(DeviceRow).where(DeviceRow.installation_id == installation_id)
            device = session.scalar(query)
            if device is None:
                if (session.scalar(select(func.count(DeviceRow.id))) or 0) >= max_devices:
                    raise RequestError(ErrorCode.SERVER_BUSY, f"{max_devices} devices enrolled")
                device = DeviceRow(
                    id=device_id,
                    installation_id=installation_id,
                    token_hash=token_hash,
                    profile=profile,
                    enrolled=self._clock(),
                )
                session.add(device)
                return device
            device.token_hash = token_hash
            self._set_profile(session, device, profile)
            return device

    def device(self, device_id: str) -> DeviceRow | None:
        """One device, or None."""
        with self._begin() as session:
            return session.get(DeviceRow, device_id)

    def set_profile(self, device_id: str, profile: str) -> bool:
        """Note a fresh profile; whether it differs. A refused device is considered again."""
        with self._begin() as session:
            return self._set_profile(session, session.get_one(DeviceRow, device_id), profile)

    def join(self, run_id: str, device_id: str) -> bool:
        """Note that the device takes part in the run; False when it did already."""
        with self._begin() as session:
            if session.get(MemberRow, (run_id, device_id)) is not None:
                return False
            session.add(MemberRow(run_id=run_id, device_id=device_id, joined=self._clock()))
            device = session.get_one(DeviceRow, device_id)
            device_class = json.loads(device.profile).get("device_class", "")
            facts = {"device": device_id, "class": device_class, "state": "joined"}
            self._tell(session, run_id, "device", **facts)
            return True

    def members(self, run_id: str) -> Sequence[tuple[MemberRow, DeviceRow]]:
        """Who takes part in a run, by device id."""
        query = (
            select(MemberRow, DeviceRow)
            .join(DeviceRow, DeviceRow.id == MemberRow.device_id)
            .where(MemberRow.run_id == run_id)
            .order_by(MemberRow.device_id)
        )
        with self._begin() as session:
            return [(row[0], row[1]) for row in session.execute(query)]

    def memberships(self, device_id: str) -> Sequence[tuple[MemberRow, RunRow]]:
        """The runs a device takes or took part in, the newest first."""
        query = (
            select(MemberRow, RunRow)
            .join(RunRow, RunRow.id == MemberRow.run_id)
            .where(MemberRow.device_id == device_id)
            .order_by(RunRow.created.desc(), RunRow.id)
        )
        with self._begin() as session:
            return [(row[0], row[1]) for row in session.execute(query)]

    def refuse(self, run_id: str, device_id: str, *, reason: str, remedy: str) -> None:
        """Note that the device cannot take part as it is."""
        with self._begin() as session:
            member = session.get_one(MemberRow, (run_id, device_id))
            member.refused_reason, member.refused_remedy = reason, remedy
            facts = {"device": device_id, "state": "refused", "reason": reason, "remedy": remedy}
            self._tell(session, run_id, "device", **facts)

    def set_result(
        self,
        run_id: str,
        device_id: str,
        *,
        package: tuple[str, int],
        adapter: tuple[str, int],
        inputs: Mapping[str, float],
        max_length: int,
    ) -> None:
        """Note what the device gets at the end: digest and size of package and adapter."""
        with self._begin() as session:
            member = session.get_one(MemberRow, (run_id, device_id))
            member.package_digest, member.package_size = package
            member.adapter_digest, member.adapter_size = adapter
            member.inputs, member.max_length = _document(inputs), max_length

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
            count = self._add_tasks(session, tasks)
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

    def busy_devices(self) -> frozenset[str]:
        """Devices that have an open task in any run."""
        query = select(TaskRow.device_id).where(TaskRow.state == TaskState.OPEN)
        with self._begin() as session:
            return frozenset(session.scalars(query))

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
                    report=_document(report),
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

    def add_event(self, run_id: str, kind: str, **facts: object) -> None:
        """Note something that is no change of state."""
        with self._begin() as session:
            self._tell(session, run_id, kind, **facts)

    def events(self, run_id: str, *, from_sequence: int = 0, limit: int = 500) -> list[EventRow]:
        """Events of a run in order, at most ``limit``."""
        query = (
            select(EventRow)
            .where(EventRow.run_id == run_id, EventRow.sequence >= from_sequence)
            .order_by(EventRow.sequence)
            .limit(limit)
        )
        with self._begin() as session:
            return list(session.scalars(query))

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

    def _open(self) -> None:
        if not inspect(self._engine).has_table(MetaRow.__tablename__):
            Table.metadata.create_all(self._engine)
            with self._begin() as session:
                session.add(MetaRow(name="schema_version", value=str(SCHEMA_VERSION)))
        with self._begin() as session:
            row = session.get(MetaRow, "schema_version")
        found = row.value if row else "none"
        if found != str(SCHEMA_VERSION):
            raise StoreError(
                f"database has tables of version {found}, this server reads {SCHEMA_VERSION}; "
                "start the server version that wrote it, or give another database"
            )

    def _set_profile(self, session: Session, device: DeviceRow, profile: str) -> bool:
        if device.profile == profile:
            return False
        device.profile = profile
        refused = select(MemberRow).where(
            MemberRow.device_id == device.id, MemberRow.refused_reason.is_not(None)
        )
        for member in session.scalars(refused):
            member.refused_reason = member.refused_remedy = None
        return True

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
            metrics=_document(metrics),
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

    def _move_run(self, session: Session, run: RunRow, after: RunState, **facts: object) -> None:
        check(RUN_TRANSITIONS, run.state, after)
        run.state = after
        self._tell(session, run.id, "state", state=after, **facts)

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

    def _tell(self, session: Session, run_id: str, kind: str, **facts: object) -> None:
        last = session.scalar(select(func.max(EventRow.sequence)).where(EventRow.run_id == run_id))
        session.add(
            EventRow(
                run_id=run_id,
                sequence=(last or 0) + 1,
                time=self._clock(),
                kind=kind,
                facts=_document(facts),
            )
        )
        session.flush()


def _run(session: Session, name_or_id: str) -> RunRow:
    query = select(RunRow).where(or_(RunRow.id == name_or_id, RunRow.name == name_or_id))
    run = session.scalar(query)
    if run is None:
        raise RequestError(ErrorCode.RUN_UNKNOWN, f"no run {name_or_id[:80]!r}")
    return run


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


def _document(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def _engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(_BEGIN))
    return engine


_BEGIN = "BEGIN IMMEDIATE"
"""Take the write lock at the start, so that no transaction fails half-way for want of it."""


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the "begin" event below starts transactions
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
