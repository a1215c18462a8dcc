# SPDX-License-Identifier: Apache-2.0
"""Tables of the store. Rows that leave the store are detached copies: read them, never write them.

Times are seconds since the epoch; they are for people and reports, and no result depends on them.
Documents (settings, profiles, reports, facts) are JSON text.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from sqlalchemy import Enum, ForeignKey, ForeignKeyConstraint, Index, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from lorikit.server.states import RoundState, RunState, TaskState

SCHEMA_VERSION = 3
"""Version of the tables below; ``migrations`` leads to it from every earlier one."""

_State = TypeVar("_State", bound=StrEnum)


def _state(kind: type[_State]) -> Enum:
    """A column of state names, so that the database reads like the program."""
    return Enum(kind, native_enum=False, values_callable=lambda k: [s.value for s in k], length=16)


class Table(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """Base of all tables."""


class MetaRow(Table):
    """Facts about the database itself, for example the version of its tables."""

    __tablename__ = "meta"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class RunRow(Table):
    """One federated fine-tuning job."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    config: Mapped[str]
    """``RunConfig.canonical``."""
    created: Mapped[float]
    state: Mapped[RunState] = mapped_column(
        _state(RunState), default=RunState.PREPARING, index=True
    )
    message: Mapped[str] = mapped_column(default="")
    """Why the run failed or was stopped."""
    stop: Mapped[str] = mapped_column(default="")
    """``after-round`` or ``at-once`` once an operator asked for the end."""
    initial_digest: Mapped[str | None] = mapped_column(default=None)
    """Blob of the method's state before the first round."""
    ended: Mapped[float | None] = mapped_column(default=None)


class DeviceRow(Table):
    """One enrolled installation."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    installation_id: Mapped[str] = mapped_column(unique=True)
    token_hash: Mapped[str]
    """SHA-256 of the device's secret; the secret itself is never kept."""
    profile: Mapped[str]
    enrolled: Mapped[float]


class MemberRow(Table):
    """A device that takes part in a run, or may not, and what it gets in the end."""

    __tablename__ = "members"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True, index=True)
    joined: Mapped[float]
    refused_reason: Mapped[str | None] = mapped_column(default=None)
    refused_remedy: Mapped[str | None] = mapped_column(default=None)
    package_digest: Mapped[str | None] = mapped_column(default=None)
    package_size: Mapped[int | None] = mapped_column(default=None)
    adapter_digest: Mapped[str | None] = mapped_column(default=None)
    adapter_size: Mapped[int | None] = mapped_column(default=None)
    inputs: Mapped[str] = mapped_column(default="{}")
    max_length: Mapped[int] = mapped_column(default=0)


class RoundRow(Table):
    """One round of a run."""

    __tablename__ = "rounds"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    opened: Mapped[float]
    state: Mapped[RoundState] = mapped_column(_state(RoundState), default=RoundState.ASSIGNING)
    attempt: Mapped[int] = mapped_column(default=0)
    """How often work was handed out anew."""
    state_digest: Mapped[str | None] = mapped_column(default=None)
    """Blob of the method's state after the round."""
    ended: Mapped[float | None] = mapped_column(default=None)


class TaskRow(Table):
    """What one device is asked to do in one round."""

    __tablename__ = "tasks"
    __table_args__ = (
        ForeignKeyConstraint(["run_id", "round"], ["rounds.run_id", "rounds.number"]),
        Index("tasks_of_device", "device_id", "state"),
        Index("tasks_of_round", "run_id", "round"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    update_id: Mapped[str] = mapped_column(unique=True)
    run_id: Mapped[str]
    round: Mapped[int]
    attempt: Mapped[int]
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    kind: Mapped[str]
    """``train`` or ``evaluate``."""
    plan: Mapped[bytes]
    """Serialised plan message."""
    package_digest: Mapped[str]
    package_size: Mapped[int]
    adapter_digest: Mapped[str]
    adapter_size: Mapped[int]
    assignment: Mapped[str]
    """What the method asked for."""
    expected: Mapped[str]
    """Names and shapes that the update must have."""
    max_update_bytes: Mapped[int]
    facts: Mapped[str]
    """Precision, rank, layers and the rest of what reports show."""
    change: Mapped[str] = mapped_column(default="")
    """The adapter as a change against one that the device holds, as JSON; empty for none."""
    created: Mapped[float] = mapped_column(default=0.0)
    state: Mapped[TaskState] = mapped_column(_state(TaskState), default=TaskState.OPEN)
    error: Mapped[str] = mapped_column(default="")
    message: Mapped[str] = mapped_column(default="")
    ended: Mapped[float | None] = mapped_column(default=None)


class UpdateRow(Table):
    """The receipt of an update: it is stored, and counted exactly once."""

    __tablename__ = "updates"
    __table_args__ = (UniqueConstraint("run_id", "round", "device_id"),)

    update_id: Mapped[str] = mapped_column(primary_key=True)
    task_id: Mapped[str] = mapped_column(ForeignKey("tasks.id"), unique=True)
    run_id: Mapped[str]
    round: Mapped[int]
    device_id: Mapped[str]
    digest: Mapped[str]
    size: Mapped[int]
    examples: Mapped[int]
    """Size of the device's data set (n_k), which methods weight by."""
    report: Mapped[str]
    received: Mapped[float]


class EvaluationRow(Table):
    """What was measured after a round, by the server or by one device."""

    __tablename__ = "evaluations"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(primary_key=True)
    """``server`` or a device id."""
    metrics: Mapped[str]
    examples: Mapped[int]


class EventRow(Table):
    """Something that happened in a run."""

    __tablename__ = "events"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    kind: Mapped[str]
    facts: Mapped[str]


class TokenRow(Table):
    """A one-time enrolment token."""

    __tablename__ = "enrolment_tokens"

    token_hash: Mapped[str] = mapped_column(primary_key=True)
    """SHA-256 of the token; the token itself is never kept."""
    issued: Mapped[float]
    expires: Mapped[float]
    used: Mapped[float | None] = mapped_column(default=None)
    used_by: Mapped[str] = mapped_column(default="")
    """Digest of installation and key that used it; the same two may ask again for the answer."""


class CertificateRow(Table):
    """A client certificate that the authority has issued."""

    __tablename__ = "certificates"

    serial: Mapped[str] = mapped_column(primary_key=True)
    """Lower-case hexadecimal."""
    subject: Mapped[str] = mapped_column(index=True)
    """``device:ID`` or ``operator:NAME``."""
    role: Mapped[str]
    """``device``, ``viewer``, ``operator`` or ``admin``."""
    key_digest: Mapped[str]
    """SHA-256 of its public key."""
    issued: Mapped[float]
    not_before: Mapped[float]
    not_after: Mapped[float]
    used: Mapped[float | None] = mapped_column(default=None)
    """First use."""
    revoked: Mapped[float | None] = mapped_column(default=None)
    reason: Mapped[str] = mapped_column(default="")


class AuditRow(Table):
    """A line of the audit log; triggers of the database refuse to change or delete one."""

    __tablename__ = "audit"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    time: Mapped[float]
    actor: Mapped[str] = mapped_column(index=True)
    """``device:ID``, ``operator:NAME``, ``unknown:HOST`` or ``local``."""
    action: Mapped[str]
    subject: Mapped[str]
    """What it was done to: a blob, an update, a run, an identity."""
    outcome: Mapped[str]
    """``ok``, or the code of the refusal."""
    detail: Mapped[str]
    digest: Mapped[str]
    """SHA-256 over the digest of the line before and this line's other columns."""
