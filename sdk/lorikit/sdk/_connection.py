# SPDX-License-Identifier: Apache-2.0
"""Tries again: calls and transfers that survive a lost server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from lorikit.proto.status import ErrorCode
from lorikit.sdk._config import ClientConfig
from lorikit.sdk._errors import (
    CancelledError,
    ConnectionLostError,
    DamagedBlobError,
    ServerRefusedError,
)
from lorikit.sdk._events import Disconnected, Event

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_REPEATABLE = {ErrorCode.OFFSET_INVALID, ErrorCode.UPDATE_CORRUPT}
_LONGEST_EXPONENT = 30


class Connection:
    """Backoff and cancellation around single attempts."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        emit: Callable[[Event], None],
        rng: np.random.Generator | None = None,
    ) -> None:
        """Args are the bounds, who hears of failures, and the source of jitter."""
        self._retry = config.retry
        self._transfer_attempts = config.transfer_attempts
        self._emit = emit
        self._rng = np.random.default_rng() if rng is None else rng
        self._wake = threading.Event()

    def interrupt(self) -> None:
        """End the wait in progress, and each one to come until ``resume``, at once."""
        self._wake.set()

    def resume(self) -> None:
        """Wait again."""
        self._wake.clear()

    def call(
        self, attempt: Callable[[], _Result], *, gained: Callable[[], int] = lambda: 0
    ) -> _Result:
        """The attempt's result, however long the server is out of reach.

        Args:
            attempt: One attempt; harmless when repeated.
            gained: What attempts got done so far, in any unit; an attempt that added to it does
                not count as failed, so that backoff starts anew.

        Raises:
            ConnectionLostError: As many attempts in a row failed as the configuration allows.
            CancelledError: ``interrupt`` was called while waiting.
        """
        failures = 0
        while True:
            before = gained()
            try:
                return attempt()
            except ConnectionLostError as error:
                failures = 1 if gained() > before else failures + 1
                if self._retry.max_attempts is not None and failures >= self._retry.max_attempts:
                    raise
                self._wait_after(failures, error)

    def transfer(self, attempt: Callable[[], _Result], *, gained: Callable[[], int]) -> _Result:
        """Like ``call``, for a stream that may also arrive damaged; that is tried a few times.

        Raises:
            DamagedBlobError: What came was wrong again and again.
            ServerRefusedError: What we sent arrived wrong again and again, or any other refusal.
        """
        damages = 0
        while True:
            before = gained()
            try:
                return self.call(attempt, gained=gained)
            except (DamagedBlobError, ServerRefusedError) as error:
                if isinstance(error, ServerRefusedError) and error.code not in _REPEATABLE:
                    raise
                damages = 1 if gained() > before else damages + 1
                if damages >= self._transfer_attempts:
                    raise
                logger.warning("transfer failed and is repeated: %s", error)
                self.sleep(self._jittered(damages))

    def pause(self, failures: int) -> None:
        """Wait before the next task after so many tasks in a row went wrong."""
        self.sleep(self._jittered(failures))

    def sleep_between(self, min_seconds: float, max_seconds: float) -> None:
        """Wait for a random time in the window that the server named."""
        low = max(0.0, min_seconds)
        self.sleep(float(self._rng.uniform(low, max(low, max_seconds))))

    def sleep(self, seconds: float) -> None:
        """Wait; the clock is the monotonic one, so that setting the time changes nothing.

        Raises:
            CancelledError: ``interrupt`` was called.
        """
        if self._wake.wait(seconds):
            raise CancelledError("interrupted while waiting")

    def _wait_after(self, failures: int, error: ConnectionLostError) -> None:
        seconds = self._jittered(failures)
        if error.retry_seconds is not None:
            # The server's own window comes first; jitter on top keeps devices apart.
            seconds += min(error.retry_seconds, self._retry.max_seconds)
        level = logging.WARNING if failures == 1 else logging.INFO
        logger.log(level, "server out of reach, trying again (attempt=%d): %s", failures, error)
        self._emit(Disconnected(message=str(error), attempt=failures, retry_seconds=seconds))
        self.sleep(seconds)

    def _jittered(self, failures: int) -> float:
        doubled = self._retry.first_seconds * 2.0 ** min(failures - 1, _LONGEST_EXPONENT)
        return float(self._rng.uniform(0, min(self._retry.max_seconds, doubled)))
