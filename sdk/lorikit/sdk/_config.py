# SPDX-License-Identifier: Apache-2.0
"""What a caller may set beyond the client's own arguments."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
}  # fmt: skip
_BYTES = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryConfig:
    """How the client comes back to a server that is out of reach.

    Waits are drawn at random between nothing and a bound that doubles with each failure ("full
    jitter"), so that a thousand devices do not come back at the same moment.

    Source:
        Brooker 2015, "Exponential Backoff And Jitter", Amazon Web Services architecture blog.
    """

    first_seconds: float = 1.0
    """Bound of the first wait; above zero."""
    max_seconds: float = 60.0
    """Bound that the doubling ends at."""
    max_attempts: int | None = None
    """Failed attempts in a row before the client gives up; None: never."""

    def __post_init__(self) -> None:
        if not 0 < self.first_seconds <= self.max_seconds < math.inf:
            raise ValueError(
                "0 < first_seconds <= max_seconds must hold, got "
                f"{self.first_seconds} and {self.max_seconds}"
            )
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1 or None, got {self.max_attempts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Times and bounds that rarely need a change."""

    wait_seconds: float = 30.0
    """Longest time one request for work waits at the server."""
    call_seconds: float = 30.0
    """Deadline of a single call, over its waiting time where it has one."""
    transfer_seconds: float = 300.0
    """Deadline of one stream of chunks; the next stream goes on where it ended."""
    transfer_attempts: int = 5
    """Streams in a row that may bring nothing, or damaged bytes, before a task is given up."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    storage_limit_bytes: int | None = None
    """Most bytes the store's blobs may take; None: what the disk has."""
    memory_interval_seconds: float = 0.05
    """How often memory is looked at while a task runs."""

    def __post_init__(self) -> None:
        for name in (
            "wait_seconds",
            "call_seconds",
            "transfer_seconds",
            "transfer_attempts",
            "memory_interval_seconds",
        ):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.storage_limit_bytes is not None and self.storage_limit_bytes < 1:
            raise ValueError(
                f"storage_limit_bytes must be positive or None, got {self.storage_limit_bytes}"
            )


def parse_bytes(size: int | str) -> int:
    """A number of bytes from a number or a text such as ``256MB`` or ``1.5 GiB``.

    Raises:
        ValueError: Not a size, not above zero, or an unknown unit.
    """
    if isinstance(size, int):
        amount = size
    else:
        match = _BYTES.fullmatch(size)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"not a size: {size!r}; write for example 256MB or 1.5GiB")
        amount = int(float(match[1]) * _UNITS[match[2].upper()])
    if amount < 1:
        raise ValueError(f"a size must be above zero, got {size!r}")
    return amount
