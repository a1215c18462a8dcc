# SPDX-License-Identifier: Apache-2.0
"""Every error of the wire as one of the SDK's, and what a server may ask a device to wait."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import grpc

from lorikit.proto.limits import ERROR_METADATA, MAX_WINDOW_SECONDS, RETRY_METADATA
from lorikit.proto.status import STATUS, ErrorCode
from lorikit.sdk._errors import (
    CancelledError,
    CertificateExpiredError,
    CertificateForeignError,
    CertificateRequiredError,
    CertificateRevokedError,
    ConnectionLostError,
    EnrolmentRefusedError,
    IdentityError,
    LorikitError,
    PackageError,
    ProtocolVersionError,
    RoleRequiredError,
    RoundClosedError,
    ServerRefusedError,
)

ERRORS: Mapping[ErrorCode, type[LorikitError]] = {
    ErrorCode.PROTOCOL_UNSUPPORTED: ProtocolVersionError,
    ErrorCode.REQUEST_INVALID: ServerRefusedError,
    ErrorCode.IDENTITY_REQUIRED: IdentityError,
    ErrorCode.ENROLMENT_REFUSED: EnrolmentRefusedError,
    ErrorCode.CERTIFICATE_REQUIRED: CertificateRequiredError,
    ErrorCode.CERTIFICATE_FOREIGN: CertificateForeignError,
    ErrorCode.CERTIFICATE_EXPIRED: CertificateExpiredError,
    ErrorCode.CERTIFICATE_REVOKED: CertificateRevokedError,
    ErrorCode.ROLE_REQUIRED: RoleRequiredError,
    ErrorCode.RATE_LIMITED: ConnectionLostError,
    ErrorCode.STREAM_STALLED: ConnectionLostError,
    ErrorCode.TASK_UNKNOWN: RoundClosedError,
    ErrorCode.ROUND_CLOSED: RoundClosedError,
    ErrorCode.BLOB_UNKNOWN: PackageError,
    ErrorCode.OFFSET_INVALID: ServerRefusedError,
    ErrorCode.UPDATE_CORRUPT: ServerRefusedError,
    ErrorCode.UPDATE_INVALID: ServerRefusedError,
    ErrorCode.UPDATE_TOO_LARGE: ServerRefusedError,
    ErrorCode.UPDATE_REPLAYED: ServerRefusedError,
    ErrorCode.RUN_UNKNOWN: ServerRefusedError,
    ErrorCode.RUN_EXISTS: ServerRefusedError,
    ErrorCode.CONFIG_INVALID: ServerRefusedError,
    ErrorCode.ADAPTER_UNKNOWN: ServerRefusedError,
    ErrorCode.SERVER_BUSY: ConnectionLostError,
    ErrorCode.SERVER_STOPPING: ConnectionLostError,
    ErrorCode.STORAGE_FULL: ConnectionLostError,
    ErrorCode.INTERNAL: ServerRefusedError,
}
"""The device's error for each code of the server; a test holds the table complete."""

_UNCODED: Mapping[grpc.StatusCode, type[LorikitError]] = {
    grpc.StatusCode.UNAVAILABLE: ConnectionLostError,
    grpc.StatusCode.DEADLINE_EXCEEDED: ConnectionLostError,
    grpc.StatusCode.CANCELLED: ConnectionLostError,
    grpc.StatusCode.ABORTED: ConnectionLostError,
    grpc.StatusCode.INTERNAL: ConnectionLostError,
    grpc.StatusCode.UNKNOWN: ConnectionLostError,
    grpc.StatusCode.DATA_LOSS: ConnectionLostError,
    grpc.StatusCode.UNAUTHENTICATED: IdentityError,
    grpc.StatusCode.PERMISSION_DENIED: IdentityError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolVersionError,
}
"""The device's error where gRPC, a proxy or a foreign server speaks instead of ours."""


def error_from(error: grpc.RpcError) -> LorikitError:
    """The SDK's error for an error of the wire."""
    assert isinstance(error, grpc.Call)  # what every failed call raises
    trailers = {key: value for key, value in error.trailing_metadata() or ()}
    sentence = error.details() or ""
    try:
        code = ErrorCode(str(trailers[ERROR_METADATA]))
    except (KeyError, ValueError):
        known = _UNCODED.get(error.code())
        text = f"{error.code().name}: {sentence}"
        return ServerRefusedError(None, text) if known is None else known(text)
    kind = ERRORS[code]
    sentence = sentence or STATUS[code].sentence
    if issubclass(kind, ServerRefusedError):
        return kind(code, sentence)
    if issubclass(kind, ConnectionLostError):
        return kind(sentence, retry_seconds=_seconds(trailers.get(RETRY_METADATA)))
    return kind(sentence)


@contextlib.contextmanager
def wire_errors() -> Iterator[None]:
    """Turn the errors of the wire into the SDK's."""
    try:
        yield
    except grpc.FutureCancelledError as error:
        raise CancelledError("the call was interrupted") from error
    except grpc.RpcError as error:
        if isinstance(error, grpc.Future) and error.cancelled():
            raise CancelledError("the call was interrupted") from error
        raise error_from(error) from error


def _seconds(text: str | bytes | None) -> float | None:
    try:
        return None if text is None else bounded_seconds(float(text))
    except ValueError:
        return None


def bounded_seconds(seconds: float) -> float:
    """A time that a server asked for, between nothing and a day; no number counts as nothing."""
    return min(max(seconds, 0.0), MAX_WINDOW_SECONDS) if not math.isnan(seconds) else 0.0
