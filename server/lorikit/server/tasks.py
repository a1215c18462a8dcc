# SPDX-License-Identifier: Apache-2.0
"""What the server says to one device: who it is, what it should do, whether to go on.

A task's lease is the device's silence: it ends when nothing was heard of the device for
``lease_seconds``. Silence is counted on a monotonic clock from the start of the server at the
earliest, so that neither a restart nor a clock that jumps takes work away from a device.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import json
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lorikit.proto.device import Profile, TrainingReport
from lorikit.proto.limits import MAX_TEXT
from lorikit.proto.status import ErrorCode
from lorikit.server.config import ServerConfig
from lorikit.server.errors import RequestError
from lorikit.server.offload import Offload
from lorikit.server.plans import identifier
from lorikit.server.signals import Signals
from lorikit.server.states import TaskState
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import MemberRow, RunRow, TaskRow
from lorikit.server.texts import plain

logger = logging.getLogger(__name__)

_MAX_TEXT = MAX_TEXT
_MAX_MESSAGE = 500
_MAX_LIST = 64
_MAX_METRICS = 64

_GONE_SECONDS = 5.0
"""A device that was silent for so long between two calls is not about to fetch anything."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Work for the device."""

    task: TaskRow
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """No work now; come back at a random time between the two, in seconds."""

    min_seconds: float
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The device cannot take part as it is."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Ended:
    """No run needs the device any more; what it gets from the last one it was in."""

    run: RunRow
    member: MemberRow


Answer = Offer | Pause | Refused | Ended


@dataclass(frozen=True, slots=True)
class Progress:
    """What a device last said it was doing."""

    state: str
    step: int
    steps: int


def run_key(run_id: str) -> str:
    """Signal of a run: something it waits for may have happened."""
    return f"run:{run_id}"


def device_key(device_id: str) -> str:
    """Signal of a device: it may have work."""
    return f"device:{device_id}"


class TaskBoard:
    """Devices, their tasks and their presence."""

    def __init__(
        self,
        store: SqlStore,
        signals: Signals,
        offload: Offload,
        config: ServerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind the parts; ``clock`` is monotonic seconds."""
        self._store = store
        self._signals = signals
        self._offload = offload
        self._config = config
        self._clock = clock
        self._started = clock()
        self._heard: dict[str, float] = {}
        self._returned: set[str] = set()
        self._waiting: Counter[str] = Counter()
        self._token_hashes: dict[str, str] = {}
        self._joined: set[tuple[str, str]] = set()
        self._progress: dict[str, Progress] = {}
        self._last_adapter: dict[str, str | None] = {}
        self._is_stopping = False

    async def enrol(
        self, installation_id: str, profile: Profile, *, with_token: bool = True
    ) -> tuple[str, str]:
        """Identity and secret of an installation; a repeated call gives a new secret.

        Args:
            installation_id: As the installation calls itself.
            profile: What the device can do.
            with_token: Whether the device is to be known by a secret; without one, none will do.

        Raises:
            RequestError: REQUEST_INVALID, or SERVER_BUSY when no more devices are taken.
        """
        check_profile(profile)
        device_id = device_of(installation_id)
        token = secrets.token_urlsafe(32)
        await self._offload.database(
            self._store.enrol,
            device_id,
            installation_id=installation_id,
            token_hash=_hash(token),
            profile=_profile_to_json(profile),
            max_devices=self._config.limits.max_devices,
        )
        self._token_hashes[device_id] = _hash(token)
        self.touch(device_id)
        logger.info("enrolled device=%s class=%s", device_id, profile.device_class)
        return device_id, token if with_token else ""

    async def authenticate(self, device_id: str, token: str) -> None:
        """Nothing, when the secret is the device's.

        Raises:
            RequestError: IDENTITY_REQUIRED otherwise.
        """
        expected = self._token_hashes.get(device_id)
        if expected is None:
            device = await self._offload.database(self._store.device, device_id)
            if device is None:
                raise RequestError(ErrorCode.IDENTITY_REQUIRED, "unknown device")
            expected = self._token_hashes.setdefault(device_id, device.token_hash)
        if not hmac.compare_digest(expected, _hash(token)):
            raise RequestError(ErrorCode.IDENTITY_REQUIRED, "wrong token")
        self.touch(device_id)

    async def recognise(self, device_id: str) -> None:
        """Note that a device whose identity is proved makes a call.

        Raises:
            RequestError: IDENTITY_REQUIRED when it is not enrolled here.
        """
        is_known = device_id in self._heard
        if not is_known and await self._offload.database(self._store.device, device_id) is None:
            raise RequestError(ErrorCode.IDENTITY_REQUIRED, "unknown device")
        self.touch(device_id)

    def touch(self, device_id: str) -> None:
        """Note that the device was heard of."""
        known = device_id in self._heard
        if not known or self.silence(device_id) > self._config.presence_seconds:
            self._returned.add(device_id)
        self._heard[device_id] = self._clock()

    def silence(self, device_id: str) -> float:
        """Seconds since the device was heard of, or since the server started."""
        if self.is_waiting(device_id):
            return 0.0
        return self._clock() - max(self._heard.get(device_id, self._started), self._started)

    def is_waiting(self, device_id: str) -> bool:
        """Whether the device has a call open that waits for work."""
        return self._waiting[device_id] > 0

    def heard(self) -> frozenset[str]:
        """Devices heard of since the start, however long ago."""
        return frozenset(self._heard)

    def present(self) -> frozenset[str]:
        """Devices heard of since the start, and lately enough to keep a lease."""
        limit = min(self._config.presence_seconds, self._config.lease_seconds)
        return frozenset(d for d in self._heard if self.silence(d) <= limit)

    def progress(self) -> Mapping[str, Progress]:
        """What devices last said, by task."""
        return dict(self._progress)

    async def next_task(
        self, device_id: str, *, wait_seconds: float, profile: Profile | None = None
    ) -> Answer:
        """Work for the device, waiting for it up to ``wait_seconds``."""
        if profile is not None:
            await self._set_profile(device_id, profile)
        wait = wait_seconds if math.isfinite(wait_seconds) else 0.0
        end = self._clock() + min(max(wait, 0.0), self._config.max_wait_seconds)
        key = device_key(device_id)
        if device_id in self._returned:
            self._returned.discard(device_id)
            await self._notify_runs()
        self._waiting[device_id] += 1
        try:
            while True:
                seen = self._signals.version(key)
                answer = await self._offload.database(self._answer, device_id)
                left = end - self._clock()
                if answer is not None:
                    self._note_last(device_id, answer)
                    return answer
                if left <= 0 or self._is_stopping:
                    return Pause(self._config.retry_seconds, 2 * self._config.retry_seconds)
                await self._signals.wait(key, seen, left)
        finally:
            self._waiting[device_id] -= 1
            self.touch(device_id)

    def received(self, device_id: str, digest: str) -> None:
        """Note that the device has a whole blob now."""
        if self._last_adapter.get(device_id) == digest:
            self._last_adapter[device_id] = None

    async def handed_out(self, timeout: float) -> bool:
        """Wait until no present device is still to fetch the last adapter of its ended runs.

        Returns:
            Whether all have it; devices that go silent meanwhile do not count.
        """
        end = self._clock() + timeout
        while await self._offload.database(self._still_fetching):
            if self._clock() >= end:
                return False
            await asyncio.sleep(0.05)
        return True

    async def heartbeat(self, device_id: str, task_id: str, progress: Progress) -> bool:
        """Whether the device should go on with the task."""
        await self.own_task(device_id, task_id)
        wanted = await self._offload.database(self._store.is_wanted, task_id)
        if wanted:
            self._progress[task_id] = progress
        else:
            self._progress.pop(task_id, None)
        return wanted

    async def fail(self, device_id: str, task_id: str, *, error: str, message: str) -> None:
        """Note that the device could not do its task."""
        task = await self.own_task(device_id, task_id)
        error, message = plain(error, _MAX_TEXT), plain(message, _MAX_MESSAGE)
        logger.warning(
            "task failed run=%s round=%d device=%s error=%s",
            task.run_id,
            task.round,
            device_id,
            error,
        )
        await self._offload.database(
            self._store.end_task,
            task_id,
            TaskState.FAILED,
            error=error,
            message=message,
        )
        self._signals.notify(run_key(task.run_id))

    async def evaluated(
        self, device_id: str, task_id: str, *, metrics: Mapping[str, float], examples: int
    ) -> None:
        """Note what the device measured on its own data."""
        task = await self.own_task(device_id, task_id)
        if len(metrics) > _MAX_METRICS:
            raise _invalid(f"{len(metrics)} metrics, {_MAX_METRICS} allowed")
        for name in metrics:
            check_text("the name of a metric", name)
        if not all(math.isfinite(value) for value in metrics.values()):
            raise _invalid("a metric is not finite")
        if not 0 <= examples < 1 << 53:
            raise _invalid(f"examples is {examples}")
        await self._offload.database(
            self._store.accept_evaluation, task_id, metrics=metrics, examples=examples
        )
        self._signals.notify(run_key(task.run_id))

    async def own_task(self, device_id: str, task_id: str) -> TaskRow:
        """The device's task; raises ``RequestError`` TASK_UNKNOWN for any other."""
        task = await self._offload.database(self._store.task, task_id)
        if task is None or task.device_id != device_id:
            raise RequestError(ErrorCode.TASK_UNKNOWN, f"no task {task_id[:80]!r} of this device")
        return task

    async def expire(self, tasks: Mapping[str, str]) -> int:
        """End the leases of silent devices; how many.

        Args:
            tasks: Device by open task.
        """
        count = 0
        for task_id, device_id in tasks.items():
            if self.silence(device_id) <= self._config.lease_seconds:
                continue
            message = f"nothing heard for {self._config.lease_seconds:g} seconds"
            count += await self._offload.database(
                self._store.end_task, task_id, TaskState.EXPIRED, message=message
            )
        return count

    def announce(self, device_ids: Iterable[str]) -> None:
        """Wake devices that wait for work."""
        self._signals.notify(*(device_key(device_id) for device_id in device_ids))

    async def forget_progress(self) -> None:
        """Drop what devices said about tasks that are over."""
        wanted = await self._offload.database(self._store.wanted_tasks)
        self._progress = {task: now for task, now in self._progress.items() if task in wanted}

    def stop(self) -> None:
        """Send waiting devices away; they come back when the server is up again."""
        self._is_stopping = True
        self._signals.notify_all()

    async def _set_profile(self, device_id: str, profile: Profile) -> None:
        check_profile(profile)
        text = _profile_to_json(profile)
        if await self._offload.database(self._store.set_profile, device_id, text):
            await self._notify_runs()

    async def _notify_runs(self) -> None:
        """Tell active runs that a device is there that was not, or has changed."""
        runs = await self._offload.database(self._store.runs, active_only=True)
        self._signals.notify(*(run_key(run.id) for run in runs))

    def _note_last(self, device_id: str, answer: Answer) -> None:
        """Remember what an ended run's device fetches now; None when that is nothing."""
        match answer:
            case Ended():
                self._last_adapter[device_id] = answer.member.adapter_digest
            case Refused():
                self._last_adapter[device_id] = None
            case _:
                self._last_adapter.pop(device_id, None)

    def _still_fetching(self) -> bool:
        """Whether a device is about to hear that its run has ended, or to fetch what it gets."""
        for device_id in list(self._heard):
            if self.silence(device_id) > _GONE_SECONDS:
                continue
            if device_id in self._last_adapter and self._last_adapter[device_id] is None:
                continue
            memberships = self._store.memberships(device_id)
            if memberships and not any(run.state.is_active for _, run in memberships):
                return True
        return False

    def _answer(self, device_id: str) -> Answer | None:
        """What the store has for the device; None when it should wait."""
        task = self._store.current_task(device_id)
        if task is not None:
            return Offer(task, self._config.lease_seconds)
        for run in self._store.runs(active_only=True):
            if (run.id, device_id) not in self._joined:
                self._store.join(run.id, device_id)
                self._joined.add((run.id, device_id))
        memberships = self._store.memberships(device_id)
        if not memberships:
            return None
        current = [member for member, run in memberships if run.state.is_active]
        last_member, last_run = memberships[0]
        judged = current or [last_member]
        if all(member.refused_reason is not None for member in judged):
            return Refused(judged[0].refused_reason or "", judged[0].refused_remedy or "")
        return None if current else Ended(last_run, last_member)


def device_of(installation_id: str) -> str:
    """The device of an installation.

    Raises:
        RequestError: REQUEST_INVALID when the installation's name is too short, long or strange.
    """
    if not 8 <= len(installation_id) <= _MAX_TEXT or not installation_id.isprintable():
        raise _invalid("installation_id must be 8 to 200 printable characters")
    return identifier("device", installation_id)


def check_profile(profile: Profile) -> None:
    """Nothing, when every field lies in its range.

    Raises:
        RequestError: REQUEST_INVALID; the detail names the field.
    """
    if not 0 < profile.memory_limit_bytes < 1 << 63:
        raise _invalid(f"profile.memory_limit_bytes is {profile.memory_limit_bytes}")
    if not 1 <= profile.cores <= 1 << 16:
        raise _invalid(f"profile.cores is {profile.cores}")
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise _invalid(f"profile.{field.name} is {value}")
        if isinstance(value, str):
            check_text(f"profile.{field.name}", value)
        if isinstance(value, tuple) and len(value) > _MAX_LIST:
            raise _invalid(f"profile.{field.name} has {len(value)} entries, {_MAX_LIST} allowed")
    texts = [*profile.operations, *profile.codecs]
    texts += [text for engine in profile.engines for text in (engine.name, engine.version)]
    for text in texts:
        check_text("a text of the profile", text)


def check_report(report: TrainingReport) -> None:
    """Nothing, when every number and text of the report lies in its range.

    Raises:
        RequestError: REQUEST_INVALID; the detail names the field.
    """
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        if isinstance(value, str):
            check_text(f"report.{field.name}", value)
        elif isinstance(value, int) and value >= 1 << 53:
            raise _invalid(f"report.{field.name} is {value}")
    for name in ("training_seconds", "download_seconds", "accuracy"):
        if getattr(report, name) < 0:
            raise _invalid(f"report.{name} is {getattr(report, name)}")


def check_text(name: str, text: str) -> None:
    """Nothing, when the text is short and can be shown as it is.

    Raises:
        RequestError: REQUEST_INVALID.
    """
    if len(text) > _MAX_TEXT:
        raise _invalid(f"{name} has {len(text)} letters, {_MAX_TEXT} allowed")
    if not text.isprintable():
        raise _invalid(f"{name} has control characters")


def _profile_to_json(profile: Profile) -> str:
    return json.dumps(dataclasses.asdict(profile), sort_keys=True)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _invalid(detail: str) -> RequestError:
    return RequestError(ErrorCode.REQUEST_INVALID, detail)
