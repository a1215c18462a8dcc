# SPDX-License-Identifier: Apache-2.0
"""What a client tells the app while it works.

Events are immutable and small, and carry numbers and names, never rows, weights or secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class State(StrEnum):
    """What a client is doing."""

    IDLE = "idle"
    CONNECTING = "connecting"
    WAITING = "waiting"
    DOWNLOADING = "downloading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    UPLOADING = "uploading"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged(Event):
    """The client does something else now."""

    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected(Event):
    """The server is out of reach; the client goes on by itself."""

    message: str
    attempt: int
    """Failed attempts in a row, from 1."""
    retry_seconds: float
    """Time until the next attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStarted(Event):
    """The server gave the device work, or the device goes on with work it had."""

    task_id: str
    round: int
    kind: str
    """``train`` or ``evaluate``."""
    method: str
    precision: str
    rank: int
    micro_batch: int
    predicted_peak_memory_bytes: int
    resumed: bool
    """Whether a journal or a finished update of this task was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded(Event):
    """A part of a blob arrived."""

    digest: str
    received_bytes: int
    """Bytes of this blob held now."""
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """An optimiser step is done."""

    task_id: str
    phase: str
    step: int
    """Steps of the whole task done, from 1."""
    steps: int
    loss: float
    """Mean loss of the step's examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded(Event):
    """A part of the update was sent."""

    task_id: str
    sent_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDone(Event):
    """The server holds this device's update durably."""

    task_id: str
    round: int
    examples: int
    first_loss: float
    last_loss: float
    accuracy: float
    """Training accuracy over the task, 0 to 1."""
    seconds: float
    """Time spent training."""
    peak_memory_bytes: int
    """Peak resident memory of the process, from the operating system."""
    anonymous_memory_bytes: int
    """The part of it that is not backed by files."""
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Event):
    """An adapter was measured on local rows."""

    task_id: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReady(Event):
    """The final adapter is here; ``predict`` and ``evaluate`` use it from now on."""

    run_id: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """A task ended without an update; the client goes on with the next one."""

    task_id: str
    error: str
    """Name of the error class."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Event):
    """The server has no work that this device could do."""

    reason: str
    remedy: str
