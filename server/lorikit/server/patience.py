# SPDX-License-Identifier: Apache-2.0
"""How long a stream may take: a device that sends nothing, or drops by drops, holds no place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError

_Message = TypeVar("_Message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Bounds of a stream's time."""

    stall_seconds: float
    """Longest wait for the next message."""
    bytes_per_second: float
    """Slowest mean rate of what was announced, on top of ``stall_seconds``."""

    def watch(self, stream: AsyncIterator[_Message]) -> Watched[_Message]:
        """The stream, which ends with an error when it takes too long."""
        return Watched(stream, self)


class Watched(Generic[_Message]):
    """A stream with a deadline for each message and, once its size is known, for the whole."""

    def __init__(self, stream: AsyncIterator[_Message], patience: Patience) -> None:
        """Bind the parts; the time of the whole starts now."""
        self._stream = stream
        self._patience = patience
        self._started = asyncio.get_running_loop().time()
        self._end: float | None = None

    def expect(self, total_bytes: int) -> None:
        """Bound the time of the whole by the size that was announced."""
        patience = self._patience
        seconds = patience.stall_seconds + total_bytes / patience.bytes_per_second
        self._end = self._started + seconds

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _Message:
        """The next message.

        Raises:
            RequestError: STREAM_STALLED.
        """
        now = asyncio.get_running_loop().time()
        wait = self._patience.stall_seconds
        if self._end is not None:
            wait = min(wait, self._end - now)
        try:
            async with asyncio.timeout(max(wait, 0.0)):
                return await anext(self._stream)
        except TimeoutError:
            raise RequestError(
                ErrorCode.STREAM_STALLED,
                f"the stream took {now - self._started + max(wait, 0.0):.0f} seconds without "
                "coming to its end",
            ) from None
