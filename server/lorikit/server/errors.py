# SPDX-License-Identifier: Apache-2.0
"""Server errors.

LorikitError
├── RequestError            the other side asked for something it cannot have; carries an ErrorCode
└── CompileError            a model cannot become a package
    ├── UnsupportedModelError   architecture, task or operator unknown; says what would be needed
    └── VerificationError       the compiled graph disagrees with torch; names the tensor
"""

from __future__ import annotations

from lorikit.proto.status import ErrorCode


class LorikitError(Exception):
    """Base of all errors the server raises on purpose."""


class RequestError(LorikitError):
    """A call cannot be served; the code and its public sentence go to the caller."""

    def __init__(
        self, code: ErrorCode, detail: str = "", *, retry_seconds: float | None = None
    ) -> None:
        """Args are the code, a detail for the caller and the log, and when to come back."""
        super().__init__(f"{code}: {detail}" if detail else str(code))
        self.code = code
        self.detail = detail
        self.retry_seconds = retry_seconds


class CompileError(LorikitError):
    """A model cannot become a package."""


class UnsupportedModelError(CompileError):
    """Architecture, task or operator is not supported; the message says what would be needed."""


class VerificationError(CompileError):
    """The compiled graph disagrees with torch + PEFT; nothing was published."""
