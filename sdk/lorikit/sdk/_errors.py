# SPDX-License-Identifier: Apache-2.0
"""Device errors.

LorikitError
├── ConnectionLostError         server out of reach or busy; the client tries again, for ever
├── ProtocolVersionError        the two sides do not understand each other; update the app or server
├── IdentityError               the server does not know this device, or refuses to enrol it
│   ├── EnrolmentRefusedError       the enrolment token is missing, used, too old or wrong
│   ├── CertificateRequiredError    the call needs a certificate, and none was shown
│   ├── CertificateForeignError     the certificate is of another authority
│   ├── CertificateExpiredError     the certificate is not valid now; enrol with a new token
│   ├── CertificateRevokedError     the operator has cut this device off
│   └── RoleRequiredError           the certificate is good, but not for this call
├── RefusedError                this device does not fit; carries the reason and the remedy
├── RoundClosedError            the work no longer counts; ask for the next task
├── ServerRefusedError          any other answer of the server; carries its code
├── PackageError                a package or adapter is missing, incomplete or of another model
│   ├── MissingBlobError            a blob is not here; it is fetched when needed
│   ├── DamagedBlobError            bytes do not match their digest; the blob is fetched again
│   ├── InvalidGraphError           a graph cannot be read or leaves its package; publish it anew
│   ├── PackageSignatureError       a package is not signed by the server of the enrolment
│   ├── ForeignAdapterError         an adapter of another model or package
│   └── UnsupportedPackageError     a newer format or a runtime that this SDK lacks
├── PlanRefusedError            a plan names an operation, version or tensor that is unknown here
├── EngineUnavailableError      the runtime is not installed; carries the command that installs it
├── EngineDisagreesError        the engine's gradients are not those the manifest expects
├── OutOfMemoryError            the memory limit is too small for the task
├── StorageFullError            the store's disk, or its share of it, is full
├── StoreBusyError              another process uses the store
├── NonFiniteError              a loss or gradient became NaN or infinite; names the tensor
├── DataError                   a local row does not fit the task
└── CancelledError              the app cancelled the work
"""

from __future__ import annotations

from lorikit.proto.status import ErrorCode


class LorikitError(Exception):
    """Base of all errors the SDK raises on purpose."""


class ConnectionLostError(LorikitError):
    """The server cannot be reached or is at its limits; the same call may succeed later."""

    def __init__(self, message: str, *, retry_seconds: float | None = None) -> None:
        """Args are the cause and, where the server named it, the time until the next attempt."""
        super().__init__(message)
        self.retry_seconds = retry_seconds


class ProtocolVersionError(LorikitError):
    """The two sides speak different protocol versions; the older one must be updated."""


class IdentityError(LorikitError):
    """The server does not know this device (it must enrol again), or refuses to enrol it."""


class EnrolmentRefusedError(IdentityError):
    """The enrolment token is missing, used, too old or wrong; ask the operator for another."""


class CertificateRequiredError(IdentityError):
    """The call needs a certificate, and the connection showed none."""


class CertificateForeignError(IdentityError):
    """The certificate was issued by another authority than the server's."""


class CertificateExpiredError(IdentityError):
    """The certificate is not valid now; check the clock, or enrol with a new token."""


class CertificateRevokedError(IdentityError):
    """The operator has cut this device off."""


class RoleRequiredError(IdentityError):
    """The certificate is good, but its role does not allow the call."""


class RefusedError(LorikitError):
    """The server has no work that this device could do."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Args are the server's two sentences: why, and the smallest change that would help."""
        super().__init__(f"{reason} {remedy}".strip())
        self.reason = reason
        self.remedy = remedy


class RoundClosedError(LorikitError):
    """The round has ended or the task is void; its work no longer counts."""


class ServerRefusedError(LorikitError):
    """The server answered with an error that no other class stands for."""

    def __init__(self, code: ErrorCode | None, message: str) -> None:
        """Args are the server's code, None where it sent none we know, and its sentence."""
        super().__init__(message)
        self.code = code


class PackageError(LorikitError):
    """A package or adapter is missing, incomplete, or belongs to another model."""


class DamagedBlobError(PackageError):
    """Bytes do not match their digest; they were dropped and are fetched again when needed."""


class MissingBlobError(PackageError):
    """A blob of the package is not on this device; it is fetched when it is needed."""


class InvalidGraphError(PackageError):
    """A graph cannot be read, is not what the manifest says, or names bytes outside its package."""


class PackageSignatureError(PackageError):
    """A package is not signed, or not by the server that this device enrolled with."""


class ForeignAdapterError(PackageError):
    """An adapter does not have the tensors or shapes of the package: it is another model's."""


class UnsupportedPackageError(PackageError):
    """A package has a newer format, or needs a runtime that this SDK lacks."""


class PlanRefusedError(LorikitError):
    """A plan names an operation, a version or a tensor that is unknown here; never guessed."""


class EngineUnavailableError(LorikitError):
    """The runtime of an engine is not installed; the message is the command that installs it."""


class EngineDisagreesError(LorikitError):
    """The engine's loss or gradients on the probe batch are not those of the manifest."""


class OutOfMemoryError(LorikitError):
    """The process could not get the memory that the task needs."""


class StorageFullError(LorikitError):
    """The disk, or the share of it that the store may use, is full."""


class StoreBusyError(LorikitError):
    """Another process uses the store; one store serves one process at a time."""


class NonFiniteError(LorikitError):
    """A loss or a gradient became NaN or infinite; the message names the tensor."""


class DataError(LorikitError):
    """A local row does not fit the task: a column is missing, a label unknown."""


class CancelledError(LorikitError):
    """The app cancelled the work."""
