# SPDX-License-Identifier: Apache-2.0
"""Tokens, certificates and the audit log."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.store.database import Database
from lorikit.server.store.tables import AuditRow, CertificateRow, TokenRow

FIRST_DIGEST = "0" * 64
"""What stands for the digest of the line before the first."""

_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """Something that happened, and who did it."""

    actor: str
    """``device:ID``, ``operator:NAME``, ``unknown:HOST`` or ``local``."""
    action: str
    subject: str = ""
    outcome: str = "ok"
    """``ok``, or the code of the refusal."""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditHead:
    """Where the audit log stands; noted elsewhere, it shows whether lines were cut off."""

    lines: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    """A certificate as the store keeps it; times are seconds since the epoch."""

    serial: str
    subject: str
    role: str
    key_digest: str
    not_before: float
    not_after: float


class IdentityStore(Database):
    """The part of the store that says who may come in, and who did what."""

    def add_token(self, token_hash: str, *, expires: float) -> None:
        """Note a one-time token."""
        with self._begin() as session:
            session.add(TokenRow(token_hash=token_hash, issued=self._clock(), expires=expires))

    def use_token(self, token_hash: str, *, used_by: str, subject: str) -> None:
        """Spend the token.

        The same user may ask again, since the answer may have been lost; not any more once a
        certificate of the subject has been used or revoked.

        Raises:
            RequestError: ENROLMENT_REFUSED when it is unknown, too old or spent by another.
        """
        with self._begin() as session:
            token = session.get(TokenRow, token_hash)
            if token is None:
                raise RequestError(ErrorCode.ENROLMENT_REFUSED, "unknown token")
            if self._clock() > token.expires:
                raise RequestError(ErrorCode.ENROLMENT_REFUSED, "the token is too old")
            if token.used is not None and (
                token.used_by != used_by or _is_in(session, subject, since=token.used)
            ):
                raise RequestError(ErrorCode.ENROLMENT_REFUSED, "the token has been used")
            token.used, token.used_by = token.used or self._clock(), used_by

    def add_certificate(self, facts: CertificateFacts) -> None:
        """Note a certificate that is about to be handed out."""
        with self._begin() as session:
            session.add(CertificateRow(issued=self._clock(), **dataclasses.asdict(facts)))

    def check_key(self, subject: str, key_digest: str) -> None:
        """Nothing, unless the subject has a good certificate of another key.

        Raises:
            RequestError: ENROLMENT_REFUSED, so that nobody takes over an identity that is in use.
        """
        query = select(CertificateRow).where(
            CertificateRow.subject == subject,
            CertificateRow.revoked.is_(None),
            CertificateRow.not_after > self._clock(),
            CertificateRow.key_digest != key_digest,
        )
        with self._begin() as session:
            if session.scalar(query.limit(1)) is not None:
                raise RequestError(
                    ErrorCode.ENROLMENT_REFUSED,
                    f"{subject} has a certificate of another key; revoke it first",
                )

    def has_certificates(self) -> bool:
        """Whether the authority of this server has issued any."""
        with self._begin() as session:
            return session.scalar(select(CertificateRow.serial).limit(1)) is not None

    def use_certificate(self, serial: str) -> CertificateRow:
        """The certificate, if it is good for a call now.

        The first use of a renewed certificate ends the ones before it.

        Raises:
            RequestError: CERTIFICATE_FOREIGN, CERTIFICATE_EXPIRED or CERTIFICATE_REVOKED.
        """
        with self._begin() as session:
            row = self._good(session, serial)
            if row.used is None:
                row.used = now = self._clock()
                earlier = select(CertificateRow).where(
                    CertificateRow.subject == row.subject,
                    CertificateRow.issued < row.issued,
                    CertificateRow.revoked.is_(None),
                )
                for old in session.scalars(earlier).all():
                    old.revoked, old.reason = now, "renewed"
            return row

    def certificate(self, serial: str) -> CertificateRow:
        """The certificate, if it is good now; looking is no use of it.

        Raises:
            RequestError: As ``use_certificate``.
        """
        with self._begin() as session:
            return self._good(session, serial)

    def revoke(self, subject: str, *, reason: str) -> int:
        """Turn a subject away from now on; how many of its certificates were good until now."""
        with self._begin() as session:
            query = select(CertificateRow).where(
                CertificateRow.subject == subject, CertificateRow.revoked.is_(None)
            )
            rows = session.scalars(query).all()
            for row in rows:
                row.revoked, row.reason = self._clock(), reason
            return len(rows)

    def certificates(self) -> Sequence[CertificateRow]:
        """Every certificate in the order it was issued."""
        with self._begin() as session:
            query = select(CertificateRow).order_by(CertificateRow.issued, CertificateRow.serial)
            return session.scalars(query).all()

    def append_audit(self, lines: Sequence[AuditLine]) -> None:
        """Add lines to the end of the audit log, all or none."""
        with self._begin() as session:
            last = session.scalar(select(AuditRow).order_by(AuditRow.sequence.desc()).limit(1))
            sequence, digest = (0, FIRST_DIGEST) if last is None else (last.sequence, last.digest)
            for line in lines:
                sequence += 1
                row = AuditRow(
                    sequence=sequence,
                    time=self._clock(),
                    actor=line.actor,
                    action=line.action,
                    subject=line.subject,
                    outcome=line.outcome,
                    detail=line.detail,
                    digest="",
                )
                row.digest = digest = line_digest(digest, row)
                session.add(row)

    def audit(self, *, after: int = 0, actor: str | None = None) -> Iterator[AuditRow]:
        """Lines of the audit log in order, from behind a number on, one page in memory."""
        while True:
            query = select(AuditRow).where(AuditRow.sequence > after)
            if actor is not None:
                query = query.where(AuditRow.actor == actor)
            with self._begin() as session:
                page = session.scalars(query.order_by(AuditRow.sequence).limit(_PAGE)).all()
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].sequence

    def _good(self, session: Session, serial: str) -> CertificateRow:
        row = session.get(CertificateRow, serial)
        if row is None:
            raise RequestError(ErrorCode.CERTIFICATE_FOREIGN, f"no certificate {serial[:80]}")
        if row.revoked is not None:
            raise RequestError(ErrorCode.CERTIFICATE_REVOKED, row.reason)
        if not row.not_before <= self._clock() <= row.not_after:
            raise RequestError(ErrorCode.CERTIFICATE_EXPIRED, f"certificate {serial}")
        return row


def _is_in(session: Session, subject: str, *, since: float) -> bool:
    """Whether the subject holds what it was given, or was turned away."""
    query = select(CertificateRow.serial).where(
        CertificateRow.subject == subject,
        CertificateRow.issued >= since,
        or_(CertificateRow.used.is_not(None), CertificateRow.revoked.is_not(None)),
    )
    return session.scalar(query.limit(1)) is not None


def line_digest(before: str, row: AuditRow) -> str:
    """Digest of a line, chained to the digest of the line before it."""
    facts = [
        row.sequence, row.time, row.actor, row.action, row.subject, row.outcome, row.detail
    ]  # fmt: skip
    return hashlib.sha256(f"{before}\n{json.dumps(facts)}".encode()).hexdigest()
