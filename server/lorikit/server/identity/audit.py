# SPDX-License-Identifier: Apache-2.0
"""The audit log: lines that are durable before the call they are about is answered.

Each line carries the digest of the one before it, so that a change anywhere shows; the database
refuses to change or delete lines. Lines of calls that come at the same time share a transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from lorikit.server.identity.rates import RateLimiter
from lorikit.server.offload import Offload
from lorikit.server.store.identity import (
    FIRST_DIGEST,
    AuditHead,
    AuditLine,
    IdentityStore,
    line_digest,
)
from lorikit.server.store.tables import AuditRow
from lorikit.server.texts import plain

_MAX_TEXT = 300
_REFUSALS_PER_SECOND = 2.0
_REFUSALS_AT_ONCE = 200.0


class AuditLog:
    """Writes lines; use it within one event loop."""

    def __init__(self, store: IdentityStore, offload: Offload) -> None:
        """Bind the parts."""
        self._store = store
        self._offload = offload
        self._waiting: list[tuple[AuditLine, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._refusals = RateLimiter(rate=_REFUSALS_PER_SECOND, burst=_REFUSALS_AT_ONCE)
        self._unwritten: dict[str, int] = {}

    async def note(self, line: AuditLine) -> None:
        """Add a line; it is durable when this returns."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((_bounded(line), done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await done

    async def refused(self, line: AuditLine) -> None:
        """Add a line about a refusal; somebody who is refused without end fills no disk.

        Lines that are left out are counted in the next one of the same actor.
        """
        if self._refusals.wait_seconds(line.actor) > 0:
            self._unwritten[line.actor] = self._unwritten.get(line.actor, 0) + 1
            return
        missing = self._unwritten.pop(line.actor, 0)
        if missing:
            line = AuditLine(
                actor=line.actor,
                action=line.action,
                subject=line.subject,
                outcome=line.outcome,
                detail=f"after {missing} more refusals without a line; {line.detail}",
            )
        await self.note(line)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await self._offload.database(self._store.append_audit, [line for line, _ in batch])
            except Exception as error:  # each caller learns that its line is not there
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                continue
            for _, done in batch:
                if not done.done():
                    done.set_result(None)
        self._writer = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a look at the whole log came to."""

    head: AuditHead
    """The last line that is as it was written."""
    broken: int | None
    """Number of the first line that is not; None where all are."""


def verify(rows: Iterable[AuditRow]) -> Verdict:
    """Follow the chain from the first line; lines cut off at the end show in the head alone."""
    head = AuditHead(lines=0, digest=FIRST_DIGEST)
    for row in rows:
        if row.sequence != head.lines + 1 or row.digest != line_digest(head.digest, row):
            return Verdict(head=head, broken=head.lines + 1)
        head = AuditHead(lines=row.sequence, digest=row.digest)
    return Verdict(head=head, broken=None)


def _bounded(line: AuditLine) -> AuditLine:
    """The line with texts from outside cut short and without control characters."""
    return AuditLine(
        actor=plain(line.actor, _MAX_TEXT),
        action=plain(line.action, _MAX_TEXT),
        subject=plain(line.subject, _MAX_TEXT),
        outcome=line.outcome,
        detail=plain(line.detail, _MAX_TEXT),
    )
