# SPDX-License-Identifier: Apache-2.0
"""Who makes a call, and whether they may.

With an authority, the connection says who it is: mutual TLS has proved that the caller holds the
key of a certificate of ours. The store is asked at every call, so that a certificate that was
revoked, has expired or was taken back with its role ends at once, not at the next handshake.
Without one, devices show the secret of their enrolment and operators nothing; that is for loopback.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

import grpc

from lorikit.proto.limits import DEVICE_METADATA, TOKEN_METADATA
from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.identity.authority import read_certificate, serial_of, subject_of
from lorikit.server.identity.subjects import Role, device_subject
from lorikit.server.offload import Offload
from lorikit.server.store.identity import IdentityStore
from lorikit.server.tasks import TaskBoard

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Mapping[str, str | bytes]

DEVICE_SERVICE = "DeviceService"
"""Service whose calls are a device's."""

_OPEN = frozenset({"Enrol", "CheckCertificate"})
"""Calls of the device service that need no certificate; nothing else does without."""

_OPERATOR_ROLES: Mapping[str, Role] = {
    "ListRuns": Role.VIEWER,
    "GetRun": Role.VIEWER,
    "WatchRun": Role.VIEWER,
    "ListAdapters": Role.VIEWER,
    "CreateRun": Role.OPERATOR,
    "StopRun": Role.OPERATOR,
    "FetchAdapter": Role.OPERATOR,
}
"""Least role of each call of the operator service; what is not here takes an admin."""

_MOST_CERTIFICATES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The method that is called."""

    service: str
    """``DeviceService`` or ``OperatorService``."""
    name: str

    @property
    def is_open(self) -> bool:
        """Whether the call is for those who have no identity yet."""
        return self.service == DEVICE_SERVICE and self.name in _OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls, as far as the connection shows."""

    subject: str
    """``device:ID``, ``operator:NAME``, or ``unknown:HOST``."""
    rate_key: str
    """Whose calls are counted together."""
    device_id: str = ""
    serial: str = ""
    """Number of the certificate; empty without one."""


class Admission(Protocol):
    """How callers are known."""

    def identify(self, metadata: Metadata, context: Context) -> Caller:
        """Who calls; asks nobody, and refuses nobody."""
        ...

    async def admit(self, call: Call, caller: Caller, metadata: Metadata) -> Caller:
        """The caller, whose identity is proved where the call needs one.

        Raises:
            RequestError: They may not make the call.
        """
        ...


class TokenAdmission:
    """Devices are known by the secret that they got when they enrolled."""

    def __init__(self, board: TaskBoard) -> None:
        """Bind the part that knows devices."""
        self._board = board

    def identify(self, metadata: Metadata, context: Context) -> Caller:
        """See ``Admission``; nothing is proved by a connection alone."""
        return Caller(subject=f"unknown:{_host(context)}", rate_key=context.peer())

    async def admit(self, call: Call, caller: Caller, metadata: Metadata) -> Caller:
        """See ``Admission``."""
        if call.service != DEVICE_SERVICE or call.is_open:
            return caller
        device = str(metadata.get(DEVICE_METADATA, ""))
        if not device:
            raise RequestError(ErrorCode.IDENTITY_REQUIRED, f"no {DEVICE_METADATA} in metadata")
        await self._board.authenticate(device, str(metadata.get(TOKEN_METADATA, "")))
        return Caller(subject=device_subject(device), rate_key=caller.rate_key, device_id=device)


class CertificateAdmission:
    """Callers are known by their certificates, which the store confirms at every call."""

    def __init__(self, board: TaskBoard, store: IdentityStore, offload: Offload) -> None:
        """Bind the parts."""
        self._board = board
        self._store = store
        self._offload = offload
        self._read: OrderedDict[bytes, tuple[str, str | None]] = OrderedDict()

    def identify(self, metadata: Metadata, context: Context) -> Caller:
        """See ``Admission``."""
        host = _host(context)
        shown = list(context.auth_context().get("x509_pem_cert", ()))
        serial, subject = self._names(shown[0]) if shown else ("", None)
        if subject is None:
            return Caller(subject=f"unknown:{host}", rate_key=f"unknown:{host}", serial=serial)
        return Caller(
            subject=subject,
            rate_key=subject,
            serial=serial,
            device_id=subject.removeprefix("device:") if subject.startswith("device:") else "",
        )

    async def admit(self, call: Call, caller: Caller, metadata: Metadata) -> Caller:
        """See ``Admission``."""
        if call.is_open:
            return caller
        if not caller.serial:
            raise RequestError(ErrorCode.CERTIFICATE_REQUIRED)
        row = await self._offload.database(self._store.use_certificate, caller.serial)
        if row.subject != caller.subject:
            raise RequestError(ErrorCode.CERTIFICATE_FOREIGN, "it names nobody known here")
        if call.service == DEVICE_SERVICE:
            wanted = Role.DEVICE
        else:
            wanted = _OPERATOR_ROLES.get(call.name, Role.ADMIN)
        if not Role(row.role).includes(wanted):
            raise RequestError(
                ErrorCode.ROLE_REQUIRED, f"{call.name} needs {wanted}, this is {row.role}"
            )
        if wanted is Role.DEVICE:
            named = metadata.get(DEVICE_METADATA)
            if named is not None and named != caller.device_id:
                raise RequestError(
                    ErrorCode.IDENTITY_REQUIRED, "the certificate is that of another device"
                )
            await self._board.recognise(caller.device_id)
        return caller

    def _names(self, pem: bytes) -> tuple[str, str | None]:
        """Number and subject of a certificate that TLS has verified."""
        if (known := self._read.get(pem)) is not None:
            return known
        certificate = read_certificate(pem)
        if certificate is None:
            return "unreadable", None
        names = serial_of(certificate), subject_of(certificate)
        self._read[pem] = names
        if len(self._read) > _MOST_CERTIFICATES:
            self._read.popitem(last=False)
        return names


def _host(context: Context) -> str:
    """The other end's address without its port."""
    kind, _, address = context.peer().partition(":")
    return unquote(address).rpartition(":")[0].strip("[]") or kind
