# SPDX-License-Identifier: Apache-2.0
"""The one table of errors: code -> (gRPC status, public sentence).

The server raises an error with a code; the service turns it into the status and the sentence, and
puts the code into the trailing metadata; the device turns the code back into one of its own errors.
Details stay in the server's log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import grpc


class ErrorCode(StrEnum):
    """What went wrong, as both ends name it."""

    PROTOCOL_UNSUPPORTED = "PROTOCOL_UNSUPPORTED"
    REQUEST_INVALID = "REQUEST_INVALID"
    IDENTITY_REQUIRED = "IDENTITY_REQUIRED"
    ENROLMENT_REFUSED = "ENROLMENT_REFUSED"
    CERTIFICATE_REQUIRED = "CERTIFICATE_REQUIRED"
    CERTIFICATE_FOREIGN = "CERTIFICATE_FOREIGN"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    CERTIFICATE_REVOKED = "CERTIFICATE_REVOKED"
    ROLE_REQUIRED = "ROLE_REQUIRED"
    RATE_LIMITED = "RATE_LIMITED"
    STREAM_STALLED = "STREAM_STALLED"
    TASK_UNKNOWN = "TASK_UNKNOWN"
    ROUND_CLOSED = "ROUND_CLOSED"
    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    OFFSET_INVALID = "OFFSET_INVALID"
    UPDATE_CORRUPT = "UPDATE_CORRUPT"
    UPDATE_INVALID = "UPDATE_INVALID"
    UPDATE_TOO_LARGE = "UPDATE_TOO_LARGE"
    UPDATE_REPLAYED = "UPDATE_REPLAYED"
    RUN_UNKNOWN = "RUN_UNKNOWN"
    RUN_EXISTS = "RUN_EXISTS"
    CONFIG_INVALID = "CONFIG_INVALID"
    ADAPTER_UNKNOWN = "ADAPTER_UNKNOWN"
    SERVER_BUSY = "SERVER_BUSY"
    SERVER_STOPPING = "SERVER_STOPPING"
    STORAGE_FULL = "STORAGE_FULL"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Status:
    """How a code travels and whether trying again can help."""

    grpc_code: grpc.StatusCode
    sentence: str
    """What the other side may know; no details."""
    retry: bool = False
    """Whether the same call may succeed later."""


STATUS: Mapping[ErrorCode, Status] = {
    ErrorCode.PROTOCOL_UNSUPPORTED: Status(
        grpc.StatusCode.FAILED_PRECONDITION,
        "The two sides speak different protocol versions; update the older one.",
    ),
    ErrorCode.REQUEST_INVALID: Status(
        grpc.StatusCode.INVALID_ARGUMENT, "A field of the request is missing or out of range."
    ),
    ErrorCode.IDENTITY_REQUIRED: Status(
        grpc.StatusCode.UNAUTHENTICATED, "The device is not known here; it must enrol (again)."
    ),
    ErrorCode.ENROLMENT_REFUSED: Status(
        grpc.StatusCode.PERMISSION_DENIED, "The enrolment token is missing, used or wrong."
    ),
    ErrorCode.CERTIFICATE_REQUIRED: Status(
        grpc.StatusCode.UNAUTHENTICATED, "This call needs a client certificate of this server."
    ),
    ErrorCode.CERTIFICATE_FOREIGN: Status(
        grpc.StatusCode.UNAUTHENTICATED, "The certificate was not issued by this server."
    ),
    ErrorCode.CERTIFICATE_EXPIRED: Status(
        grpc.StatusCode.UNAUTHENTICATED, "The certificate is not valid at this time."
    ),
    ErrorCode.CERTIFICATE_REVOKED: Status(
        grpc.StatusCode.PERMISSION_DENIED, "The certificate has been revoked."
    ),
    ErrorCode.ROLE_REQUIRED: Status(
        grpc.StatusCode.PERMISSION_DENIED, "The certificate's role does not allow this call."
    ),
    ErrorCode.RATE_LIMITED: Status(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many calls; come back later.", retry=True
    ),
    ErrorCode.STREAM_STALLED: Status(
        grpc.StatusCode.UNAVAILABLE, "The stream stood still for too long.", retry=True
    ),
    ErrorCode.TASK_UNKNOWN: Status(
        grpc.StatusCode.NOT_FOUND, "The task does not exist or belongs to another device."
    ),
    ErrorCode.ROUND_CLOSED: Status(
        grpc.StatusCode.ABORTED, "The round has ended; the work no longer counts."
    ),
    ErrorCode.BLOB_UNKNOWN: Status(grpc.StatusCode.NOT_FOUND, "No blob has that digest."),
    ErrorCode.OFFSET_INVALID: Status(
        grpc.StatusCode.OUT_OF_RANGE, "The offset is not where the transfer stands; ask again."
    ),
    ErrorCode.UPDATE_CORRUPT: Status(
        grpc.StatusCode.DATA_LOSS,
        "A chunk or the whole does not match its digest; send it again.",
        retry=True,
    ),
    ErrorCode.UPDATE_INVALID: Status(
        grpc.StatusCode.INVALID_ARGUMENT,
        "The update has wrong names or shapes, or numbers that are not finite.",
    ),
    ErrorCode.UPDATE_TOO_LARGE: Status(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "The update is larger than this server accepts."
    ),
    ErrorCode.UPDATE_REPLAYED: Status(
        grpc.StatusCode.ALREADY_EXISTS, "Another update was accepted under that name."
    ),
    ErrorCode.RUN_UNKNOWN: Status(grpc.StatusCode.NOT_FOUND, "No run has that name or id."),
    ErrorCode.RUN_EXISTS: Status(
        grpc.StatusCode.ALREADY_EXISTS, "A run of that name exists with other settings."
    ),
    ErrorCode.CONFIG_INVALID: Status(
        grpc.StatusCode.INVALID_ARGUMENT, "The settings of the run are not valid."
    ),
    ErrorCode.ADAPTER_UNKNOWN: Status(
        grpc.StatusCode.NOT_FOUND, "The run has no adapter of that name."
    ),
    ErrorCode.SERVER_BUSY: Status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "The server is at its limits; come back later.",
        retry=True,
    ),
    ErrorCode.SERVER_STOPPING: Status(
        grpc.StatusCode.UNAVAILABLE, "The server is shutting down; come back later.", retry=True
    ),
    ErrorCode.STORAGE_FULL: Status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "The server's storage is full; come back later.",
        retry=True,
    ),
    ErrorCode.INTERNAL: Status(grpc.StatusCode.INTERNAL, "The server failed; its log says why."),
}
"""Every code with its status; a test holds it complete on both ends."""
