# SPDX-License-Identifier: Apache-2.0
"""What an operator's computer says to the server, as plain calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from lorikit.proto.limits import (
    ERROR_METADATA,
    MAX_MESSAGE_BYTES,
    PROTOCOL_METADATA,
    PROTOCOL_VERSION,
)
from lorikit.proto.status import ErrorCode
from lorikit.proto.v1 import operator_service_pb2 as messages
from lorikit.proto.v1.operator_service_pb2_grpc import OperatorServiceStub
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.errors import RequestError

_METADATA = ((PROTOCOL_METADATA, str(PROTOCOL_VERSION)),)
_CALL_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the server is and how it is trusted."""

    address: str
    """``host:port``."""
    root_certificates: Path | None = None
    """PEM file of the authority that signed the server's certificate; absent means the system's."""
    insecure: bool = False
    """Whether to speak without TLS, to a server on the same machine."""
    certificate: Path | None = None
    """PEM file of the operator's own certificate; absent where the server has no authority."""
    key: Path | None = None
    """PEM file of its private key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """State of one run."""

    run_id: str
    name: str
    method: str
    state: str
    """``preparing``, ``running``, ``finished``, ``stopped`` or ``failed``."""
    round: int
    rounds: int
    metric: float | None
    """Last measured metric; None before the first."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """One thing that happened in a run."""

    sequence: int
    time: float
    """Seconds since the epoch."""
    kind: str
    facts: Mapping[str, Any]


class OperatorClient:
    """A connection to the operator service; use it as a context manager.

    Every call raises ``RequestError`` if the server refuses, and ``CommandError`` if it does not
    answer.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        """Connects on the first call."""
        self._address = endpoint.address
        self._channel = _channel(endpoint)
        self._stub = OperatorServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()

    def create(self, name: str, config_json: str) -> RunSummary:
        """Start a run; the same name and settings again give the run that exists.

        Args:
            name: Unique on the server.
            config_json: ``RunConfig.canonical()``.
        """
        request = messages.CreateRunRequest(name=name, config_json=config_json)
        with self._translated():
            return _summary(
                self._stub.CreateRun(request, metadata=_METADATA, timeout=_CALL_SECONDS)
            )

    def list(self) -> tuple[RunSummary, ...]:
        """All runs of the server."""
        request = messages.ListRunsRequest()
        with self._translated():
            answer = self._stub.ListRuns(request, metadata=_METADATA, timeout=_CALL_SECONDS)
        return tuple(_summary(run) for run in answer.runs)

    def get(self, run_id: str) -> tuple[RunSummary, Mapping[str, Any]]:
        """One run, and its report so far."""
        request = messages.GetRunRequest(run_id=run_id)
        with self._translated():
            answer = self._stub.GetRun(request, metadata=_METADATA, timeout=_CALL_SECONDS)
        return _summary(answer.summary), json.loads(answer.report_json or "{}")

    def watch(self, run_id: str, *, from_sequence: int = 0) -> Iterator[RunEvent]:
        """Events as they happen, until the run ends."""
        request = messages.WatchRunRequest(run_id=run_id, from_sequence=from_sequence)
        with self._translated():
            for event in self._stub.WatchRun(request, metadata=_METADATA):
                yield RunEvent(
                    sequence=event.sequence,
                    time=event.time,
                    kind=event.kind,
                    facts=json.loads(event.facts_json or "{}"),
                )

    def stop(self, run_id: str, *, at_once: bool) -> RunSummary:
        """End a run after the round in progress, or at once."""
        request = messages.StopRunRequest(run_id=run_id, at_once=at_once)
        with self._translated():
            return _summary(self._stub.StopRun(request, metadata=_METADATA, timeout=_CALL_SECONDS))

    def adapters(self, run_id: str) -> tuple[str, ...]:
        """Names of the adapter folders a run has written."""
        request = messages.ListAdaptersRequest(run_id=run_id)
        with self._translated():
            answer = self._stub.ListAdapters(request, metadata=_METADATA, timeout=_CALL_SECONDS)
        return tuple(answer.names)

    def fetch(self, run_id: str, name: str, folder: Path) -> tuple[Path, ...]:
        """Write the files of an adapter into a folder.

        Raises:
            CommandError: A file arrived damaged, or its name is not a plain file name; what had
                arrived of it is removed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        request = messages.FetchAdapterRequest(run_id=run_id, name=name)
        files: dict[Path, str] = {}
        with self._translated():
            for chunk in self._stub.FetchAdapter(request, metadata=_METADATA):
                path = folder / _plain_name(chunk.file)
                with path.open("ab" if chunk.offset else "wb") as file:
                    if file.tell() != chunk.offset:
                        raise CommandError(
                            ExitCode.REFUSED,
                            f"{path.name} arrived with a gap at byte {file.tell()}; fetch it again",
                        )
                    file.write(chunk.data)
                files[path] = chunk.digest or files.get(path, "")
        for path, digest in files.items():
            _check_digest(path, digest)
        return tuple(files)

    def issue_token(self, valid_seconds: float) -> str:
        """A one-time token that lets one device enrol; takes an admin."""
        request = messages.IssueTokenRequest(valid_seconds=valid_seconds)
        with self._translated():
            answer = self._stub.IssueToken(request, metadata=_METADATA, timeout=_CALL_SECONDS)
        return answer.token

    def revoke(self, subject: str, reason: str) -> int:
        """Cut off ``device:ID`` or ``operator:NAME``; how many certificates were good until now."""
        request = messages.RevokeIdentityRequest(subject=subject, reason=reason)
        with self._translated():
            answer = self._stub.RevokeIdentity(request, metadata=_METADATA, timeout=_CALL_SECONDS)
        return answer.revoked

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _translated_error(error, self._address) from error


def _channel(endpoint: Endpoint) -> grpc.Channel:
    options = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)
    if endpoint.insecure:
        return grpc.insecure_channel(endpoint.address, options)
    roots, key, certificate = (
        None if path is None else path.read_bytes()
        for path in (endpoint.root_certificates, endpoint.key, endpoint.certificate)
    )
    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    return grpc.secure_channel(endpoint.address, credentials, options)


def _translated_error(error: grpc.RpcError, address: str) -> Exception:
    """The refusal the server meant, or the sentence for a server that does not answer."""
    status = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else "") or ""
    code = _error_code(error)
    if code is not None:
        return RequestError(code, details)
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return CommandError(
            ExitCode.UNREACHABLE,
            f"no Lorikit server answers at {address} ({details}); start one with `lorikit server "
            "--address HOST:PORT`, and give both sides the same --insecure or certificates; a "
            "server with an authority wants --certificate too",
        )
    return CommandError(ExitCode.REFUSED, f"{address} answered {status.name}: {details}")


def _error_code(error: grpc.RpcError) -> ErrorCode | None:
    """The code of the error table that travelled with the error."""
    if isinstance(error, grpc.Call):
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_METADATA and value in ErrorCode.__members__:
                return ErrorCode(str(value))
    return None


def _summary(message: messages.RunSummary) -> RunSummary:
    return RunSummary(
        run_id=message.run_id,
        name=message.name,
        method=message.method,
        state=message.state,
        round=message.round,
        rounds=message.rounds,
        metric=None if message.metric != message.metric else message.metric,
        message=message.message,
    )


def _plain_name(name: str) -> str:
    if not name or name == ".." or Path(name).name != name or "\\" in name:
        raise CommandError(ExitCode.REFUSED, f"server sent the file name {name!r}, which is unsafe")
    return name


def _check_digest(path: Path, expected: str) -> None:
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        path.unlink()
        raise CommandError(
            ExitCode.REFUSED,
            f"{path.name} arrived damaged (SHA-256 {actual}, expected {expected or 'none sent'}); "
            "fetch it again",
        )
