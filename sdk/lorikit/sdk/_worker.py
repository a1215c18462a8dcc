# SPDX-License-Identifier: Apache-2.0
"""Does one task: download, train or evaluate, upload."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lorikit.proto.manifest import BlobRef, Manifest, digest_of
from lorikit.proto.tensors import Tensors, pack
from lorikit.sdk._config import ClientConfig
from lorikit.sdk._connection import Connection
from lorikit.sdk._data import Dataset, Row, read_dataset
from lorikit.sdk._errors import (
    CancelledError,
    PlanRefusedError,
    RoundClosedError,
    StorageFullError,
)
from lorikit.sdk._events import (
    Event,
    Metrics,
    Progress,
    RoundDone,
    State,
    TaskStarted,
    Uploaded,
)
from lorikit.sdk._feed import Feed
from lorikit.sdk._heap import release_freed_memory
from lorikit.sdk._heartbeat import Heartbeat
from lorikit.sdk._inference import measure
from lorikit.sdk._keys import check_package
from lorikit.sdk._memory import MemoryWatch, memory_use
from lorikit.sdk._packages import Packages, read_adapter
from lorikit.sdk._plan import PlanExecutor
from lorikit.sdk._store import LastAdapter, PendingUpdate, Store
from lorikit.sdk._transport import AdapterChange, Task, Transport
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines.base import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A package, ready to run on the local rows."""

    package: BlobRef
    manifest: Manifest
    data: Dataset
    max_length: int
    """Length that the rows were cut at."""
    engine: Engine


class Worker:
    """One device's hands. What a task opened stays open for the next one on the same package."""

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        engine: str,
        threads: int,
        store: Store,
        transport: Transport,
        connection: Connection,
        feed: Feed,
        config: ClientConfig,
        cancelled: Callable[[], bool],
    ) -> None:
        """Wire the parts; ``cancelled`` is asked often, in the worker's thread."""
        self._rows = rows
        self._engine_name = engine
        self._threads = threads
        self._store = store
        self._transport = transport
        self._connection = connection
        self._feed = feed
        self._config = config
        self._cancelled = cancelled
        self._packages = Packages(store.blobs, transport, connection, emit=feed.emit)
        self._opened: _Opened | None = None

    def do(self, task: Task) -> None:
        """Carry the task out, from wherever an earlier attempt left it.

        Raises:
            RoundClosedError: The server does not want the result any more.
            CancelledError: ``cancelled`` turned true.
            LorikitError: Whatever else keeps the task from its end.
        """
        self._store.keep_only(task_id=task.task_id, update_id=task.update_id)
        update = self._store.pending_update(task.update_id)
        resumed = update is not None or self._store.journal.load(task.task_id) is not None
        self._feed.emit(_started(task, resumed))
        with Heartbeat(self._transport, task) as heartbeat:
            try:
                if task.kind == "evaluate":
                    self._evaluate(task, heartbeat)
                elif task.kind == "train":
                    self._deliver(task, update or self._train(task, heartbeat), heartbeat)
                else:
                    raise PlanRefusedError(f"unknown kind of task {task.kind!r}; update the SDK")
            except Exception as error:
                if heartbeat.void:
                    raise RoundClosedError("the server said that the task is void") from error
                raise

    def take_final(self, last: LastAdapter, package_signature: bytes = b"") -> None:
        """Download a run's final adapter with its package, and use it from now on."""
        self._feed.enter(State.DOWNLOADING)
        self._check_signature(last.package, package_signature)
        manifest, digests = self._fetch(last.package, last.adapter, self._cancelled)
        read_adapter(self._store.blobs, last.adapter, manifest)
        self._store.save_last_adapter(dataclasses.replace(last, blobs=digests))

    def abandon(self, task: Task) -> None:
        """Forget what was done for a task whose result the server has, or does not want."""
        self._store.journal.clear(task.task_id)
        self._store.clear_update(task.update_id)

    def release(self) -> None:
        """Close what is open and give its memory back."""
        if self._opened is not None:
            self._opened.engine.close()
            self._opened = None
            release_freed_memory()

    def _train(self, task: Task, heartbeat: Heartbeat) -> PendingUpdate:
        received = self._packages.received_bytes
        started = time.monotonic()
        interval = self._config.memory_interval_seconds
        with MemoryWatch(interval_seconds=interval) as memory:
            opened, adapter = self._open(task, heartbeat)
            download_seconds = time.monotonic() - started
            self._enter(State.TRAINING, heartbeat)
            executor = PlanExecutor(
                opened.engine,
                opened.manifest,
                opened.data,
                journal=self._store.journal,
                residuals=self._store.residuals,
                emit=lambda event: self._progress(event, heartbeat),
                cancelled=lambda: heartbeat.void or self._cancelled(),
            )
            outcome = executor.run(task.plan, adapter, task.task_id)
        report = dataclasses.replace(
            outcome.report,
            engine=self._engine_name,
            download_seconds=download_seconds,
            bytes_down=self._packages.received_bytes - received,
            peak_memory_bytes=memory_use().peak_resident_bytes,
            anonymous_memory_bytes=memory.peak_anonymous_bytes,
        )
        update = PendingUpdate(
            update_id=task.update_id,
            task_id=task.task_id,
            report=report,
            data=pack(outcome.bundle),
        )
        self._keep(update)
        return update

    def _keep(self, update: PendingUpdate) -> None:
        """Let the update replace its journal on disk; where there is no room, the journal stays."""
        try:
            self._store.save_update(update)
            self._store.journal.clear(update.task_id)
        except StorageFullError as error:
            logger.warning("update is sent without a copy on disk: %s", error)

    def _deliver(self, task: Task, update: PendingUpdate, heartbeat: Heartbeat) -> None:
        self._enter(State.UPLOADING, heartbeat)
        digest = digest_of(update.data)
        held = 0
        sent = 0

        def attempt() -> None:
            nonlocal held, sent
            if heartbeat.void or self._cancelled():
                raise CancelledError("cancelled before the update was sent")
            status = self._transport.upload_status(task.task_id, task.update_id, digest)
            held = status.offset
            if status.accepted:
                return
            self._transport.upload(
                task.task_id,
                task.update_id,
                update.data,
                update.report,
                offset=status.offset,
                on_sent=on_sent,
            )

        def on_sent(position: int) -> None:
            nonlocal sent
            sent = position
            self._feed.emit(
                Uploaded(task_id=task.task_id, sent_bytes=position, total_bytes=len(update.data))
            )

        self._connection.transfer(attempt, gained=lambda: held)
        self.abandon(task)
        self._feed.emit(_done(task, update, sent))

    def _evaluate(self, task: Task, heartbeat: Heartbeat) -> None:
        opened, adapter = self._open(task, heartbeat)
        self._enter(State.EVALUATING, heartbeat)
        metrics = measure(
            opened.engine,
            opened.manifest.task,
            opened.data,
            adapter,
            task.plan.inputs,
            most=task.plan.facts.micro_batch,
            cancelled=lambda: heartbeat.void or self._cancelled(),
        )
        examples = len(opened.data)
        self._connection.call(
            lambda: self._transport.report_evaluation(task.task_id, metrics, examples)
        )
        self._feed.emit(Metrics(task_id=task.task_id, metrics=metrics, examples=examples))

    def _open(self, task: Task, heartbeat: Heartbeat) -> tuple[_Opened, Tensors]:
        """The task's package, opened, and the adapter to start from."""
        self._enter(State.DOWNLOADING, heartbeat)
        self._check_signature(task.package, task.package_signature)
        manifest, digests = self._fetch(
            task.package,
            task.adapter,
            lambda: heartbeat.void or self._cancelled(),
            change=task.change,
        )
        adapter = read_adapter(self._store.blobs, task.adapter, manifest)
        self._store.save_last_adapter(
            LastAdapter(
                run_id=task.run_id,
                package=task.package,
                adapter=task.adapter,
                inputs=task.plan.inputs,
                max_length=task.plan.max_length,
                blobs=digests,
            )
        )
        return self._opened_for(task, manifest), adapter

    def _check_signature(self, package: BlobRef, signature: bytes) -> None:
        """Refuse a package that the server of the enrolment has not signed, where it signs them."""
        if key := self._store.identity().package_key:
            check_package(package.digest, signature, bytes.fromhex(key))

    def _fetch(
        self,
        package: BlobRef,
        adapter: BlobRef,
        cancelled: Callable[[], bool],
        *,
        change: AdapterChange | None = None,
    ) -> tuple[Manifest, tuple[str, ...]]:
        last = self._store.last_adapter()
        return self._packages.fetch_package(
            package,
            adapter,
            engine=self._engine_name,
            change=change,
            spared=() if last is None else last.blobs,
            cancelled=cancelled,
        )

    def _opened_for(self, task: Task, manifest: Manifest) -> _Opened:
        opened = self._opened
        data = _reusable(opened, manifest, task.plan.max_length)
        if opened is not None and data is not None and opened.package == task.package:
            return opened
        self.release()
        # Texts and tokeniser come and go before the engine is there: they never add up.
        data = data or self._read_rows(manifest, task.plan.max_length)
        engine = open_engine(
            self._engine_name, manifest, self._store.blobs.folder, threads=self._threads
        )
        self._opened = _Opened(
            package=task.package,
            manifest=manifest,
            data=data,
            max_length=task.plan.max_length,
            engine=engine,
        )
        return self._opened

    def _read_rows(self, manifest: Manifest, max_length: int) -> Dataset:
        blob = manifest.tokenizer
        tokenizer = None if blob is None else self._store.blobs.read(blob)
        return read_dataset(self._rows, manifest, tokenizer, max_length)

    def _enter(self, state: State, heartbeat: Heartbeat) -> None:
        heartbeat.state = state
        self._feed.enter(state)

    def _progress(self, event: Event, heartbeat: Heartbeat) -> None:
        if isinstance(event, Progress):
            heartbeat.step, heartbeat.steps = event.step, event.steps
        self._feed.emit(event)


def _reusable(opened: _Opened | None, manifest: Manifest, max_length: int) -> Dataset | None:
    """The rows as they were read before, if another reading would give the same."""
    if opened is None or opened.max_length != max_length:
        return None
    return opened.data if _reading(opened.manifest) == _reading(manifest) else None


def _reading(manifest: Manifest) -> tuple[object, ...]:
    """All that the reading of rows depends on."""
    return manifest.tokenizer, manifest.task, manifest.text, manifest.image


def _started(task: Task, resumed: bool) -> TaskStarted:
    facts = task.plan.facts
    return TaskStarted(
        task_id=task.task_id,
        round=task.round,
        kind=task.kind,
        method=task.plan.method,
        precision=facts.precision,
        rank=facts.rank,
        micro_batch=facts.micro_batch,
        predicted_peak_memory_bytes=facts.predicted_peak_memory_bytes,
        resumed=resumed,
    )


def _done(task: Task, update: PendingUpdate, sent_bytes: int) -> RoundDone:
    report = update.report
    return RoundDone(
        task_id=task.task_id,
        round=task.round,
        examples=report.examples,
        first_loss=report.first_loss,
        last_loss=report.last_loss,
        accuracy=report.accuracy,
        seconds=report.training_seconds,
        peak_memory_bytes=report.peak_memory_bytes,
        anonymous_memory_bytes=report.anonymous_memory_bytes,
        bytes_up=sent_bytes,
        bytes_down=report.bytes_down,
    )
