# SPDX-License-Identifier: Apache-2.0
"""Letting devices and operators in, and cutting them off.

A device comes with a one-time token and a signing request for a key of its own. The token is spent
by installation and key, so that a lost answer can be asked for again, and by nobody else.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.hazmat.primitives.asymmetric import ec

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.identity.authority import (
    Authority,
    key_digest,
    read_certificate,
    requested_key,
    serial_of,
    subject_of,
)
from lorikit.server.identity.subjects import Role, device_subject, is_subject
from lorikit.server.store.identity import IdentityStore

_TOKEN_BYTES = 32
_MAX_TOKEN_SECONDS = 90 * 86_400.0
_MAX_TOKEN = 200


class Registry:
    """The authority and the store together; every call is made in the store's thread."""

    def __init__(
        self, authority: Authority, store: IdentityStore, *, certificate_days: float
    ) -> None:
        """Bind the parts; ``certificate_days`` is how long a client's certificate is good."""
        self.authority = authority
        self._store = store
        self._days = certificate_days

    def issue_token(self, *, valid_seconds: float, now: float) -> str:
        """A one-time token; it is in no log and cannot be shown again.

        Raises:
            RequestError: REQUEST_INVALID when the time is out of range.
        """
        if not 0 < valid_seconds <= _MAX_TOKEN_SECONDS:
            raise RequestError(
                ErrorCode.REQUEST_INVALID,
                f"a token is good for up to {_MAX_TOKEN_SECONDS:.0f} seconds, got "
                f"{valid_seconds:g}",
            )
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._store.add_token(_digest(token), expires=now + valid_seconds)
        return token

    def enrol(
        self, device_id: str, *, installation_id: str, token: str, signing_request: bytes
    ) -> bytes:
        """The certificate of a device that came with a token.

        Raises:
            RequestError: ENROLMENT_REFUSED, or REQUEST_INVALID for a wrong signing request.
        """
        if not signing_request:
            raise RequestError(
                ErrorCode.ENROLMENT_REFUSED,
                "this server wants a signing request; give the device an enrolment token",
            )
        if not 0 < len(token) <= _MAX_TOKEN:
            raise RequestError(ErrorCode.ENROLMENT_REFUSED, "no token")
        key = requested_key(signing_request)
        subject = device_subject(device_id)
        user = hashlib.sha256(f"{installation_id}\n{key_digest(key)}".encode()).hexdigest()
        self._store.use_token(_digest(token), used_by=user, subject=subject)
        self._store.check_key(subject, key_digest(key))
        return self._issue(subject, key, Role.DEVICE)

    def renew(self, subject: str, *, role: Role, signing_request: bytes) -> bytes:
        """A fresh certificate of somebody who has a good one."""
        return self._issue(subject, requested_key(signing_request), role)

    def issue_operator(self, subject: str, key: ec.EllipticCurvePublicKey, *, role: Role) -> bytes:
        """A certificate for an operator.

        Raises:
            RequestError: REQUEST_INVALID when the name is none.
        """
        if not is_subject(subject):
            raise RequestError(
                ErrorCode.REQUEST_INVALID,
                f"{subject[:100]!r} is no name; use letters, digits, dots, dashes, underscores",
            )
        return self._issue(subject, key, role)

    def revoke(self, subject: str, *, reason: str) -> int:
        """Turn a subject away from now on; how many certificates were good until now.

        Raises:
            RequestError: REQUEST_INVALID when the text names no subject.
        """
        if not is_subject(subject):
            raise RequestError(
                ErrorCode.REQUEST_INVALID,
                f"{subject[:100]!r} is not device:ID or operator:NAME",
            )
        return self._store.revoke(subject, reason=reason or "revoked")

    def check(self, pem: bytes) -> str:
        """The subject of a certificate that is good now.

        Raises:
            RequestError: CERTIFICATE_REQUIRED, _FOREIGN, _EXPIRED or _REVOKED.
        """
        if not pem:
            raise RequestError(ErrorCode.CERTIFICATE_REQUIRED)
        certificate = read_certificate(pem)
        if certificate is None or not self.authority.has_issued(certificate):
            raise RequestError(ErrorCode.CERTIFICATE_FOREIGN, "it has another issuer")
        row = self._store.certificate(serial_of(certificate))
        if row.subject != subject_of(certificate):
            raise RequestError(ErrorCode.CERTIFICATE_FOREIGN, "it names nobody known here")
        return row.subject

    def _issue(self, subject: str, key: ec.EllipticCurvePublicKey, role: Role) -> bytes:
        pem, facts = self.authority.issue_client(subject, key, role=role, days=self._days)
        self._store.add_certificate(facts)
        return pem


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
