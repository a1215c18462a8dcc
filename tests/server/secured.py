# SPDX-License-Identifier: Apache-2.0
"""A real server with an authority, and callers with certificates of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tests.server.federation import Device, profile, server_config, start_server

from lorikit.proto.limits import PROTOCOL_METADATA
from lorikit.proto.v1 import device_service_pb2 as messages
from lorikit.proto.v1.device_service_pb2_grpc import DeviceServiceStub
from lorikit.proto.v1.operator_service_pb2_grpc import OperatorServiceStub
from lorikit.proto.wire import profile_to_message
from lorikit.sdk._keys import new_key, signing_request
from lorikit.server.app import Server
from lorikit.server.config import ServerConfig
from lorikit.server.identity.authority import Authority
from lorikit.server.identity.authority import new_key as new_operator_key
from lorikit.server.identity.enrolment import Registry
from lorikit.server.identity.subjects import Role, operator_subject
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import AuditRow

METADATA = [(PROTOCOL_METADATA, "1")]


@dataclass
class Badge:
    """A key and its certificate, PEM."""

    key: bytes
    certificate: bytes

    def credentials(self, roots: bytes) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(roots, self.key, self.certificate)


class SecuredServer:
    """A server with an authority; ``store`` is a second process's view of its database."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config: ServerConfig = server_config(folder, **changes)
        self.authority = Authority.create(self.config.identity_folder, hosts=["localhost"])
        self.roots = self.authority.root_pem

    def __enter__(self) -> SecuredServer:
        self.server: Server = start_server(self.config)
        self.store = SqlStore(self.config.database_url)
        self.registry = Registry(self.authority, self.store, certificate_days=90.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.store.close()

    def token(self, valid_seconds: float = 60.0) -> str:
        return self.registry.issue_token(valid_seconds=valid_seconds, now=self.store._clock())

    def front(self, name: str = "installation-0", **changes: Any) -> Device:
        """Somebody without a certificate, where devices enrol."""
        credentials = grpc.ssl_channel_credentials(self.roots)
        return Device(self.server.enrol_address, name, credentials=credentials, **changes)

    def enrolled(self, name: str = "installation-0", *, memory: int = 40) -> tuple[Device, Badge]:
        """A device with a certificate, connected."""
        device_id, badge = self.badge(name, token=self.token(), memory=memory)
        device = self.connected(badge, name)
        device.device_id = device_id
        return device, badge

    def badge(
        self, name: str, *, token: str, key: bytes | None = None, memory: int = 40
    ) -> tuple[str, Badge]:
        """What the server gives for a token."""
        key = key or new_key()
        device = self.front(name)
        request = messages.EnrolRequest(
            installation_id=name,
            profile=profile_to_message(profile(memory)),
            enrolment_token=token,
            signing_request=signing_request(key),
        )
        try:
            answer = device.call("Enrol", request)
        finally:
            device.close()
        return answer.device_id, Badge(key, answer.certificate)

    def connected(self, badge: Badge, name: str = "installation-0") -> Device:
        return Device(self.server.address, name, credentials=badge.credentials(self.roots))

    def operator(self, name: str, role: Role) -> Badge:
        public, private = new_operator_key()
        certificate = self.registry.issue_operator(operator_subject(name), public, role=role)
        return Badge(private, certificate)

    def channel(self, badge: Badge) -> grpc.Channel:
        return grpc.secure_channel(self.server.address, badge.credentials(self.roots))

    def ask(self, badge: Badge, method: str, request: Any) -> Any:
        """One call of the operator service."""
        with self.channel(badge) as channel:
            call = getattr(OperatorServiceStub(channel), method)
            return call(request, metadata=METADATA, timeout=20)

    def why(self, certificate: bytes) -> Any:
        """What the server says of a certificate, where devices enrol."""
        credentials = grpc.ssl_channel_credentials(self.roots)
        with grpc.secure_channel(self.server.enrol_address, credentials) as channel:
            request = messages.CheckCertificateRequest(certificate=certificate)
            return DeviceServiceStub(channel).CheckCertificate(
                request, metadata=METADATA, timeout=20
            )

    def lines(self, **facts: str) -> list[AuditRow]:
        """Lines of the audit log with those facts; they are durable before a call is answered."""
        rows = list(self.store.audit())
        return [row for row in rows if all(getattr(row, n) == v for n, v in facts.items())]
