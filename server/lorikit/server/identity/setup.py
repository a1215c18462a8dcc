# SPDX-License-Identifier: Apache-2.0
"""Puts the parts of identity together, and makes what a port needs to show and to ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from lorikit.server.config import ServerConfig
from lorikit.server.identity.admission import Admission, CertificateAdmission, TokenAdmission
from lorikit.server.identity.audit import AuditLog
from lorikit.server.identity.authority import Authority
from lorikit.server.identity.enrolment import Registry
from lorikit.server.identity.errors import AuthorityError
from lorikit.server.identity.rates import RateLimiter
from lorikit.server.offload import Offload
from lorikit.server.store.identity import IdentityStore
from lorikit.server.tasks import TaskBoard


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityParts:
    """How a server knows its callers."""

    registry: Registry | None
    """None without an authority."""
    admission: Admission
    audit: AuditLog
    rates: RateLimiter


def open_identity(
    config: ServerConfig, *, store: IdentityStore, board: TaskBoard, offload: Offload
) -> IdentityParts:
    """The parts, with the authority that lies in the server's folder, if there is one.

    Raises:
        AuthorityError: The authority cannot be read, or is gone although it has issued
            certificates: a server does not fall back to less than its devices rely on.
    """
    limits = config.limits
    admission: Admission = TokenAdmission(board)
    registry = None
    if Authority.exists(config.identity_folder):
        if config.insecure:
            raise AuthorityError(
                f"{config.identity_folder} holds an authority, so this server speaks TLS; leave "
                "out --insecure"
            )
        registry = Registry(
            Authority(config.identity_folder), store, certificate_days=config.certificate_days
        )
        admission = CertificateAdmission(board, store, offload)
    elif store.has_certificates():
        raise AuthorityError(
            f"this server has issued certificates, but {config.identity_folder} holds no "
            "authority; restore it from a backup"
        )
    return IdentityParts(
        registry=registry,
        admission=admission,
        audit=AuditLog(store, offload),
        rates=RateLimiter(rate=limits.calls_per_second, burst=limits.call_burst),
    )


def server_credentials(
    certificate: Path, key: Path, *, clients: bytes | None = None
) -> grpc.ServerCredentials:
    """What the server shows; files that are replaced are shown from the next handshake on.

    Args:
        certificate: Chain of the server, PEM.
        key: Its private key, PEM.
        clients: Authority that has to have issued the clients' certificates, PEM; None lets
            clients in without one.

    Raises:
        OSError: A file cannot be read.
    """
    fetch = _fetcher(certificate, key, clients)
    first = fetch()
    assert first is not None
    return grpc.dynamic_ssl_server_credentials(
        first,
        fetch,  # type: ignore[arg-type]  # the stubs lack the None that says "unchanged"
        require_client_authentication=clients is not None,
    )


def _fetcher(
    certificate: Path, key: Path, clients: bytes | None
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """Reads the files where they have changed since the last call."""
    seen: list[bytes] = []

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        pair = [key.read_bytes(), certificate.read_bytes()]
        if pair == seen:
            return None
        seen[:] = pair
        return grpc.ssl_server_certificate_configuration([(pair[0], pair[1])], clients)

    return fetch
