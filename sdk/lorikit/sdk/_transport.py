# SPDX-License-Identifier: Apache-2.0
"""How a device talks to the server: typed calls, one attempt each, with deadlines.

``GrpcTransport`` is the only part of the SDK that knows gRPC and the generated code. It checks
what comes in, and turns every error of the wire into one of the SDK's. Trying again is the
caller's decision.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc

from lorikit.proto.device import Profile, TrainingReport
from lorikit.proto.limits import (
    CHUNK_BYTES,
    DEVICE_METADATA,
    MAX_CERTIFICATE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_LENGTH,
    MAX_SENTENCE,
    MAX_TEXT,
    PROTOCOL_METADATA,
    PROTOCOL_VERSION,
    TOKEN_METADATA,
)
from lorikit.proto.manifest import BlobRef, ManifestError, digest_of
from lorikit.proto.plan import Plan, PlanError
from lorikit.proto.status import ErrorCode
from lorikit.proto.v1 import device_service_pb2 as pb
from lorikit.proto.v1 import device_service_pb2_grpc as rpc
from lorikit.proto.wire import (
    blob_from_message,
    plan_from_message,
    profile_to_message,
    report_to_message,
)
from lorikit.sdk._channels import enrol_address, open_channel
from lorikit.sdk._config import ClientConfig
from lorikit.sdk._errors import (
    CancelledError,
    ConnectionLostError,
    DamagedBlobError,
    IdentityError,
    LorikitError,
    PackageError,
    ProtocolVersionError,
    ServerRefusedError,
)
from lorikit.sdk._wire_errors import bounded_seconds, wire_errors

logger = logging.getLogger(__name__)

_Reply = TypeVar("_Reply")

_WHY_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChange:
    """An adapter as a change against another one."""

    base: BlobRef
    """The adapter that the change is against."""
    blob: BlobRef
    """The change, a serialised TensorBundle with a wire header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the device is asked to do."""

    task_id: str
    run_id: str
    round: int
    kind: str
    """``train`` or ``evaluate``."""
    update_id: str
    """Name of the update the task yields; the same after every restart."""
    lease_seconds: float
    plan: Plan
    package: BlobRef
    """The package's manifest."""
    adapter: BlobRef
    """A serialised TensorBundle."""
    package_signature: bytes = b""
    change: AdapterChange | None = None
    """The same adapter in fewer bytes, where the device still holds the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableTask:
    """A task that this SDK does not understand; it is to be reported as failed."""

    task_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryWindow:
    """No work now; come back at a random time between the two, in seconds from now."""

    min_seconds: float
    max_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The device cannot take part."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The run is over."""

    run_id: str
    package: BlobRef | None
    adapter: BlobRef | None
    inputs: Mapping[str, float]
    max_length: int
    package_signature: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """Who this device is from now on."""

    device_id: str
    token: str = field(default="", repr=False)
    """Secret; empty where there is a certificate."""
    certificate: bytes = b""
    """PEM; empty where the server has no authority."""
    package_key: bytes = b""
    """Ed25519 key that signs packages, raw; empty where nothing is signed."""


Offer = Task | UnreadableTask | RetryWindow | Refusal | Finished
"""The server's answer to a request for work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The server's answer to a heartbeat."""

    go_on: bool
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadProgress:
    """How much of an update the server holds."""

    offset: int
    accepted: bool
    """Complete and counted."""


class Transport(Protocol):
    """The server as a device sees it; one attempt per call.

    Every call raises ``ConnectionLostError`` when the server is out of reach or busy,
    ``CancelledError`` after ``interrupt``, and the error that ``ERRORS`` has for the server's code.
    """

    def identify(
        self, device_id: str, token: str, *, key: bytes = b"", certificate: bytes = b""
    ) -> None:
        """Use this identity for the calls to come; a key and its certificate are PEM."""
        ...

    def enrol(
        self,
        installation_id: str,
        profile: Profile,
        enrolment_token: str,
        signing_request: bytes = b"",
    ) -> Enrolment:
        """Who this installation is; harmless when repeated."""
        ...

    def renew(self, signing_request: bytes) -> bytes:
        """A fresh certificate, PEM, for the key of the request."""
        ...

    def heartbeat(self, task_id: str, state: str, step: int, steps: int) -> Lease:
        """Keep the lease of a task."""
        ...

    def next_task(self, wait_seconds: float, profile: Profile | None) -> Offer:
        """Wait for work."""
        ...

    def download(self, blob: BlobRef, offset: int) -> Iterator[bytes]:
        """The blob's bytes from the offset on, chunk by chunk, each verified."""
        ...

    def upload_status(self, task_id: str, update_id: str, digest: str) -> UploadProgress:
        """How much of the update the server holds."""
        ...

    def upload(
        self,
        task_id: str,
        update_id: str,
        data: bytes,
        report: TrainingReport,
        *,
        offset: int,
        on_sent: Callable[[int], None],
    ) -> None:
        """Send an update from the offset on; when it returns, the server has it durably."""
        ...

    def report_evaluation(self, task_id: str, metrics: Mapping[str, float], examples: int) -> None:
        """Tell what was measured."""
        ...

    def report_failure(self, task_id: str, error: str, message: str) -> None:
        """Tell that a task ended without an update."""
        ...

    def interrupt(self) -> None:
        """Make every call, in progress or to come, raise ``CancelledError`` until ``resume``."""
        ...

    def resume(self) -> None:
        """Allow calls again."""
        ...

    def close(self) -> None:
        """Give the connection back."""
        ...


class GrpcTransport:
    """``Transport`` over gRPC."""

    def __init__(
        self,
        server: str,
        *,
        insecure: bool = False,
        root_certificates: bytes | None = None,
        enrol_server: str | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        """Nothing is sent before the first call.

        Args:
            server: Address, ``host:port``.
            insecure: No encryption. Must be asked for by name.
            root_certificates: PEM of the authorities to trust; None: the system's.
            enrol_server: Where a device that has no certificate asks for one; None: the next port.
            config: Deadlines.
        """
        self._config = config or ClientConfig()
        self._open = partial(open_channel, insecure=insecure, root_certificates=root_certificates)
        self._server = server
        self._enrol_server = enrol_server or enrol_address(server)
        self._certificate = b""
        self._channel = self._open(server)
        self._stub = rpc.DeviceServiceStub(self._channel)
        self._metadata = [(PROTOCOL_METADATA, str(PROTOCOL_VERSION))]
        self._identity: list[tuple[str, str]] = []
        self._calls: set[grpc.Future[Any] | grpc.RpcContext] = set()
        self._interrupted = False
        self._lock = threading.Lock()

    def identify(
        self, device_id: str, token: str, *, key: bytes = b"", certificate: bytes = b""
    ) -> None:
        """See ``Transport``."""
        self._identity = [(DEVICE_METADATA, device_id)]
        if token:
            self._identity.append((TOKEN_METADATA, token))
        if certificate != self._certificate:
            self._channel.close()
            self._channel = self._open(self._server, key=key, certificate=certificate)
            self._stub = rpc.DeviceServiceStub(self._channel)
            self._certificate = certificate

    def enrol(
        self,
        installation_id: str,
        profile: Profile,
        enrolment_token: str,
        signing_request: bytes = b"",
    ) -> Enrolment:
        """See ``Transport``."""
        request = pb.EnrolRequest(
            installation_id=installation_id,
            profile=profile_to_message(profile),
            enrolment_token=enrolment_token,
            signing_request=signing_request,
        )
        if signing_request:
            with self._open(self._enrol_server) as channel:
                reply = self._call(rpc.DeviceServiceStub(channel).Enrol, request)
        else:
            reply = self._call(self._stub.Enrol, request)
        texts = (reply.device_id, reply.token)
        if not all(t.isascii() and t.isprintable() and len(t) <= MAX_TEXT for t in texts):
            raise ServerRefusedError(None, "the server gave an identity that no call can carry")
        if max(len(reply.certificate), len(reply.package_key)) > MAX_CERTIFICATE_BYTES:
            raise ServerRefusedError(None, "the server gave a certificate that is too long")
        return Enrolment(
            device_id=reply.device_id,
            token=reply.token,
            certificate=reply.certificate,
            package_key=reply.package_key,
        )

    def renew(self, signing_request: bytes) -> bytes:
        """See ``Transport``."""
        request = pb.RenewCertificateRequest(signing_request=signing_request)
        return self._call(self._stub.RenewCertificate, request).certificate

    def heartbeat(self, task_id: str, state: str, step: int, steps: int) -> Lease:
        """See ``Transport``."""
        request = pb.HeartbeatRequest(task_id=task_id, state=state, step=step, steps=steps)
        reply = self._call(self._stub.Heartbeat, request)
        return Lease(go_on=reply.go_on, lease_seconds=bounded_seconds(reply.lease_seconds))

    def next_task(self, wait_seconds: float, profile: Profile | None) -> Offer:
        """See ``Transport``."""
        request = pb.NextTaskRequest(
            wait_seconds=wait_seconds,
            profile=None if profile is None else profile_to_message(profile),
        )
        return _offer(self._call(self._stub.NextTask, request, extra_seconds=wait_seconds))

    def download(self, blob: BlobRef, offset: int) -> Iterator[bytes]:
        """See ``Transport``."""
        request = pb.DownloadBlobRequest(digest=blob.digest, offset=offset)
        with self._errors():
            call = self._stub.DownloadBlob(
                request, timeout=self._config.transfer_seconds, metadata=self._call_metadata()
            )
            with self._tracked(call):
                for message in call:
                    yield _checked_chunk(message, blob, offset)
                    offset += len(message.data)
        if offset < blob.size:
            raise ConnectionLostError(
                f"the stream of blob {blob.digest} ended {blob.size - offset} bytes early"
            )

    def check_certificate(self) -> None:
        """Nothing, when the server finds our certificate good; asks where devices enrol.

        Raises:
            IdentityError: What is wrong with it; ``CertificateRequiredError`` where there is none.
            ConnectionLostError: Nobody answers there.
        """
        request = pb.CheckCertificateRequest(certificate=self._certificate)
        with self._open(self._enrol_server) as channel, wire_errors():
            call = rpc.DeviceServiceStub(channel).CheckCertificate.future(
                request, timeout=_WHY_SECONDS, metadata=tuple(self._metadata)
            )
            with self._tracked(call):
                call.result()

    def upload_status(self, task_id: str, update_id: str, digest: str) -> UploadProgress:
        """See ``Transport``."""
        request = pb.UploadStatusRequest(task_id=task_id, update_id=update_id, digest=digest)
        reply = self._call(self._stub.UploadStatus, request)
        return UploadProgress(offset=reply.offset, accepted=reply.accepted)

    def upload(
        self,
        task_id: str,
        update_id: str,
        data: bytes,
        report: TrainingReport,
        *,
        offset: int,
        on_sent: Callable[[int], None],
    ) -> None:
        """See ``Transport``."""
        if offset > len(data):
            raise ServerRefusedError(
                ErrorCode.OFFSET_INVALID, f"the server holds {offset} of {len(data)} bytes"
            )
        header = pb.UploadHeader(
            task_id=task_id,
            update_id=update_id,
            digest=digest_of(data),
            total_size=len(data),
            offset=offset,
            report=report_to_message(report),
        )
        with self._errors():
            call = self._stub.UploadUpdate.future(
                _upload_messages(header, data, on_sent),
                timeout=self._config.transfer_seconds,
                metadata=self._call_metadata(),
            )
            with self._tracked(call):
                reply = call.result()
        if reply.update_id != update_id:
            raise ServerRefusedError(None, f"receipt names {reply.update_id!r}, not {update_id!r}")

    def report_evaluation(self, task_id: str, metrics: Mapping[str, float], examples: int) -> None:
        """See ``Transport``."""
        request = pb.ReportEvaluationRequest(task_id=task_id, metrics=metrics, examples=examples)
        self._call(self._stub.ReportEvaluation, request)

    def report_failure(self, task_id: str, error: str, message: str) -> None:
        """See ``Transport``."""
        request = pb.ReportFailureRequest(task_id=task_id, error=error, message=message)
        self._call(self._stub.ReportFailure, request)

    def interrupt(self) -> None:
        """See ``Transport``."""
        with self._lock:
            self._interrupted = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def resume(self) -> None:
        """See ``Transport``."""
        with self._lock:
            self._interrupted = False

    def close(self) -> None:
        """See ``Transport``."""
        self._channel.close()

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Any, _Reply],
        request: object,
        *,
        extra_seconds: float = 0.0,
    ) -> _Reply:
        with self._errors():
            call = method.future(
                request,
                timeout=self._config.call_seconds + extra_seconds,
                metadata=self._call_metadata(),
            )
            with self._tracked(call):
                return call.result()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """The SDK's errors for those of the wire, also for what TLS turned away without a word."""
        try:
            with wire_errors():
                yield
        except ConnectionLostError as error:
            if self._certificate and error.retry_seconds is None:
                self._ask_why(error)
            raise

    def _ask_why(self, error: ConnectionLostError) -> None:
        """Raise what the server has against our certificate; nothing where it says nothing.

        A handshake that fails gives no reason; where devices enrol, no certificate is needed.
        """
        try:
            self.check_certificate()
        except IdentityError as reason:
            raise reason from error
        except LorikitError as silence:
            logger.debug("no reason for a lost connection: %s", silence)

    def _call_metadata(self) -> tuple[tuple[str, str], ...]:
        return (*self._metadata, *self._identity)

    @contextlib.contextmanager
    def _tracked(self, call: Any) -> Iterator[None]:  # noqa: ANN401  # a future or a stream
        """Let ``interrupt`` reach the call; whoever leaves early ends it."""
        with self._lock:
            self._calls.add(call)
            interrupted = self._interrupted
        try:
            if interrupted:
                raise CancelledError("the call was interrupted")
            yield
        finally:
            with self._lock:
                self._calls.discard(call)
            call.cancel()


def _offer(reply: pb.NextTaskResponse) -> Offer:
    match reply.WhichOneof("outcome"):
        case "task":
            return _task(reply.task)
        case "wait":
            return RetryWindow(
                min_seconds=bounded_seconds(reply.wait.min_seconds),
                max_seconds=bounded_seconds(reply.wait.max_seconds),
            )
        case "refused":
            return Refusal(
                reason=reply.refused.reason[:MAX_SENTENCE],
                remedy=reply.refused.remedy[:MAX_SENTENCE],
            )
        case "finished":
            return _finished(reply.finished)
    raise ProtocolVersionError("the server answered with work of an unknown kind; update the SDK")


def _task(message: pb.Task) -> Task | UnreadableTask:
    try:
        return Task(
            task_id=message.task_id,
            run_id=message.run_id,
            round=message.round,
            kind=message.kind,
            update_id=message.update_id,
            lease_seconds=bounded_seconds(message.lease_seconds),
            plan=plan_from_message(message.plan),
            package=blob_from_message(message.package),
            adapter=blob_from_message(message.adapter),
            package_signature=message.package_signature,
            change=_change(message.change) if message.HasField("change") else None,
        )
    except (PlanError, ManifestError) as error:
        return UnreadableTask(task_id=message.task_id, reason=str(error))


def _change(message: pb.AdapterChange) -> AdapterChange:
    return AdapterChange(base=blob_from_message(message.base), blob=blob_from_message(message.blob))


def _finished(message: pb.Finished) -> Finished:
    try:
        return Finished(
            run_id=message.run_id,
            package=blob_from_message(message.package) if message.HasField("package") else None,
            adapter=blob_from_message(message.adapter) if message.HasField("adapter") else None,
            inputs=dict(message.inputs),
            max_length=min(message.max_length, MAX_LENGTH),
            package_signature=message.package_signature,
        )
    except ManifestError as error:
        raise PackageError(f"the final adapter cannot be named: {error}") from error


def _checked_chunk(message: pb.DownloadBlobResponse, blob: BlobRef, offset: int) -> bytes:
    """The chunk's bytes; what does not belong at this place of this blob is refused."""
    if message.total_size != blob.size or message.offset != offset:
        raise DamagedBlobError(
            f"blob {blob.digest}: got byte {message.offset} of {message.total_size}, "
            f"wanted {offset} of {blob.size}"
        )
    if not 0 < len(message.data) <= min(MAX_CHUNK_BYTES, blob.size - offset):
        raise DamagedBlobError(f"blob {blob.digest}: chunk of {len(message.data)} bytes")
    if hashlib.sha256(message.data).digest() != message.chunk_digest:
        raise DamagedBlobError(f"blob {blob.digest}: chunk at byte {offset} is damaged")
    return message.data


def _upload_messages(
    header: pb.UploadHeader, data: bytes, on_sent: Callable[[int], None]
) -> Iterator[pb.UploadUpdateRequest]:
    yield pb.UploadUpdateRequest(header=header)
    for offset in range(header.offset, len(data), CHUNK_BYTES):
        chunk = data[offset : offset + CHUNK_BYTES]
        digest = hashlib.sha256(chunk).digest()
        yield pb.UploadUpdateRequest(
            chunk=pb.UploadChunk(offset=offset, data=chunk, chunk_digest=digest)
        )
        on_sent(offset + len(chunk))
