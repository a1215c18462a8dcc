# SPDX-License-Identifier: Apache-2.0
"""Taking in an update: in chunks, resumable, checked, and counted once.

What has arrived of an update lies in a partial file named by task and digest. It becomes a blob
when the whole matches its digest and keeps the rules of its plan; the receipt follows in the
database. A server that dies between any two of these steps goes on from what is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorikit.proto.device import TrainingReport
from lorikit.proto.limits import MAX_CHUNK_BYTES
from lorikit.proto.manifest import is_digest
from lorikit.proto.status import ErrorCode
from lorikit.server.config import LimitsConfig, parse_run_config
from lorikit.server.errors import RequestError
from lorikit.server.failpoints import Reach, unreached
from lorikit.server.offload import Offload
from lorikit.server.plans import expected_from_json
from lorikit.server.signals import Signals
from lorikit.server.states import TaskState
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import TaskRow
from lorikit.server.tasks import TaskBoard, run_key
from lorikit.server.updates import read_update

logger = logging.getLogger(__name__)

_SUFFIX = ".part"
_MAX_EXAMPLES = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a device says before it sends an update."""

    task_id: str
    update_id: str
    digest: str
    total_size: int
    offset: int
    report: TrainingReport


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an update."""

    offset: int
    data: bytes
    digest: bytes
    """SHA-256 of ``data``, raw."""


class Uploads:
    """Updates on their way in."""

    def __init__(
        self,
        folder: Path,
        *,
        store: SqlStore,
        private: FolderBlobs,
        board: TaskBoard,
        signals: Signals,
        offload: Offload,
        limits: LimitsConfig,
        reach: Reach = unreached,
    ) -> None:
        """Bind the parts; ``folder`` holds the partial files."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = store
        self._private = private
        self._board = board
        self._signals = signals
        self._offload = offload
        self._limits = limits
        self._reach = reach
        self._active = 0
        self._writer: dict[str, object] = {}

    async def status(
        self, device_id: str, task_id: str, update_id: str, digest: str
    ) -> tuple[int, bool]:
        """Bytes held of the update, and whether it has its receipt.

        Raises:
            RequestError: TASK_UNKNOWN, REQUEST_INVALID, or ROUND_CLOSED when it cannot count.
        """
        task = await self._task(device_id, task_id, update_id, digest)
        if await self._is_accepted(update_id):
            return 0, True
        await self._check_wanted(task)
        return await self._offload.file(self._held, task_id, digest), False

    async def receive(self, device_id: str, header: Header, chunks: AsyncIterator[Chunk]) -> bool:
        """Take an update in; whether it had been accepted before.

        Raises:
            RequestError: What is wrong with the task, the header, a chunk or the content.
        """
        task = await self._task(device_id, header.task_id, header.update_id, header.digest)
        held = await self._offload.database(self._store.update, header.update_id)
        if held is not None:
            if held.digest != header.digest:
                raise RequestError(
                    ErrorCode.UPDATE_REPLAYED, f"update {header.update_id[:80]} has its receipt"
                )
            return True
        await self._check_wanted(task)
        limit = min(task.max_update_bytes, self._limits.max_update_bytes)
        if not 0 < header.total_size <= limit:
            raise RequestError(
                ErrorCode.UPDATE_TOO_LARGE, f"{header.total_size} bytes, {limit} allowed"
            )
        with self._slot():
            await self._collect(device_id, header, chunks)
            return not await self._accept(task, header)

    async def forget(self) -> None:
        """Remove what arrived of updates that can no longer count."""
        wanted = await self._offload.database(self._store.wanted_tasks)
        await self._offload.file(self._remove_partials, wanted)

    async def _task(self, device_id: str, task_id: str, update_id: str, digest: str) -> TaskRow:
        if not is_digest(digest):
            raise RequestError(ErrorCode.REQUEST_INVALID, f"digest is {digest[:80]!r}")
        task = await self._board.own_task(device_id, task_id)
        if task.update_id != update_id or task.kind != "train":
            raise RequestError(
                ErrorCode.TASK_UNKNOWN, f"task {task_id} has no update {update_id[:80]!r}"
            )
        return task

    async def _is_accepted(self, update_id: str) -> bool:
        return await self._offload.database(self._store.update, update_id) is not None

    async def _check_wanted(self, task: TaskRow) -> None:
        if not await self._offload.database(self._store.is_wanted, task.id):
            raise RequestError(
                ErrorCode.ROUND_CLOSED, f"round {task.round} no longer takes this update"
            )

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the uploads that may run at a time."""
        if self._active >= self._limits.max_uploads:
            raise RequestError(
                ErrorCode.SERVER_BUSY,
                f"{self._active} uploads at a time",
                retry_seconds=self._limits.busy_retry_seconds,
            )
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def _collect(self, device_id: str, header: Header, chunks: AsyncIterator[Chunk]) -> None:
        """Append chunks to the partial file until the whole is there.

        A second stream for the same update takes over: the first belongs to a connection that the
        device has given up.
        """
        mine = self._writer[header.task_id] = object()
        held = await self._offload.file(self._held, header.task_id, header.digest)
        if header.offset != held:
            raise _offset(header.offset, held)
        async for chunk in chunks:
            if self._writer.get(header.task_id) is not mine:
                raise _offset(chunk.offset, held, "another stream took over")
            _check_chunk(chunk, held, header.total_size)
            await self._offload.file(self._append, header.task_id, header.digest, chunk)
            held += len(chunk.data)
            self._board.touch(device_id)
        if held < header.total_size:
            raise RequestError(
                ErrorCode.UPDATE_CORRUPT, f"stream ended at {held} of {header.total_size} bytes"
            )

    async def _accept(self, task: TaskRow, header: Header) -> bool:
        """Check the whole and give it its receipt; False when it had one."""
        try:
            examples = await self._offload.check(self._check, task, header)
        except RequestError as error:
            if error.code is ErrorCode.UPDATE_INVALID:
                await self._reject(task, header, error)
            raise
        await self._offload.file(self._keep, header)
        self._reach("update.kept")
        accepted = await self._offload.database(
            self._store.accept_update,
            task.id,
            digest=header.digest,
            size=header.total_size,
            examples=examples,
            report=_plain(header.report),
        )
        self._reach("update.accepted")
        self._writer.pop(task.id, None)
        self._signals.notify(run_key(task.run_id))
        return accepted

    async def _reject(self, task: TaskRow, header: Header, error: RequestError) -> None:
        logger.warning(
            "update rejected run=%s round=%d device=%s: %s",
            task.run_id,
            task.round,
            task.device_id,
            error.detail,
        )
        await self._offload.file(self._path(header.task_id, header.digest).unlink, missing_ok=True)
        await self._offload.database(
            self._store.end_task,
            task.id,
            TaskState.REJECTED,
            error=error.code,
            message=error.detail[:500],
        )
        self._signals.notify(run_key(task.run_id))

    def _path(self, task_id: str, digest: str) -> Path:
        return self._folder / f"{task_id}.{digest}{_SUFFIX}"

    def _held(self, task_id: str, digest: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._path(task_id, digest).stat().st_size
        # Whole already: the server stopped between storing the blob and the receipt.
        return self._private.ref(digest).size if self._private.has(digest) else 0

    def _append(self, task_id: str, digest: str, chunk: Chunk) -> None:
        for path in self._folder.glob(f"{task_id}.*{_SUFFIX}"):
            if path != self._path(task_id, digest):
                path.unlink(missing_ok=True)
        try:
            with self._path(task_id, digest).open("ab") as file:
                if file.tell() == chunk.offset:
                    file.write(chunk.data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RequestError(ErrorCode.STORAGE_FULL, f"upload of task {task_id}") from error
            raise

    def _check(self, task: TaskRow, header: Header) -> int:
        """The update's number of examples, when it is whole and keeps the rules of its plan."""
        path = self._path(header.task_id, header.digest)
        data = path.read_bytes() if path.exists() else self._private.read(header.digest)
        if len(data) != header.total_size or hashlib.sha256(data).hexdigest() != header.digest:
            path.unlink(missing_ok=True)
            raise RequestError(
                ErrorCode.UPDATE_CORRUPT, "the whole does not match its digest; start again from 0"
            )
        run = self._store.run(task.run_id)
        limit = parse_run_config(run.config).max_update_norm
        update = read_update(data, expected_from_json(task.expected), max_norm=limit)
        examples = update.scalars.get("examples", header.report.dataset_size)
        if not 1 <= examples <= _MAX_EXAMPLES or examples != int(examples):
            raise RequestError(
                ErrorCode.UPDATE_INVALID, f"examples is {examples}, 1..{_MAX_EXAMPLES} allowed"
            )
        return int(examples)

    def _keep(self, header: Header) -> None:
        path = self._path(header.task_id, header.digest)
        if path.exists():
            self._private.put_file(path)

    def _remove_partials(self, wanted: frozenset[str]) -> None:
        for path in self._folder.glob(f"*{_SUFFIX}"):
            task_id = path.name.partition(".")[0]
            if task_id not in wanted:
                path.unlink(missing_ok=True)
                self._writer.pop(task_id, None)


def _check_chunk(chunk: Chunk, held: int, total_size: int) -> None:
    if chunk.offset != held:
        raise _offset(chunk.offset, held)
    if not 0 < len(chunk.data) <= MAX_CHUNK_BYTES:
        raise RequestError(
            ErrorCode.REQUEST_INVALID, f"chunk of {len(chunk.data)} bytes, 1..{MAX_CHUNK_BYTES}"
        )
    if held + len(chunk.data) > total_size:
        raise RequestError(
            ErrorCode.UPDATE_TOO_LARGE, f"more than the declared {total_size} bytes arrive"
        )
    if hashlib.sha256(chunk.data).digest() != chunk.digest:
        raise RequestError(ErrorCode.UPDATE_CORRUPT, f"chunk at {chunk.offset} is damaged")


def _offset(given: int, held: int, why: str = "") -> RequestError:
    detail = f"offset {given}, but {held} bytes are here" + (f"; {why}" if why else "")
    return RequestError(ErrorCode.OFFSET_INVALID, detail)


def _plain(report: TrainingReport) -> dict[str, object]:
    """The report as JSON can hold it; what is not finite was not measured."""
    return {
        name: 0.0 if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(report).items()
    }
