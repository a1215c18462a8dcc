# SPDX-License-Identifier: Apache-2.0
"""Keeps the lease of a task while the device works on it."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from lorikit.sdk._errors import (
    CancelledError,
    ConnectionLostError,
    IdentityError,
    LorikitError,
    RoundClosedError,
)
from lorikit.sdk._events import State
from lorikit.sdk._transport import Task, Transport

logger = logging.getLogger(__name__)

_SHORTEST_SECONDS = 0.2
_BEATS_PER_LEASE = 3


class Heartbeat:
    """Tells the server, from a thread of its own, that the task is still worked on.

    Fields ``state``, ``step`` and ``steps`` are what it tells; the worker sets them.
    """

    def __init__(self, transport: Transport, task: Task) -> None:
        """Beats begin when it is entered."""
        self.state = State.DOWNLOADING
        self.step = 0
        self.steps = 0
        self.void = False
        """Whether the server said that the task no longer counts."""
        self._transport = transport
        self._task_id = task.task_id
        self._lease_seconds = task.lease_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorikit-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A beat that hangs in the network ends by its own deadline; nobody needs its answer.
        self._done.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._done.wait(max(self._lease_seconds / _BEATS_PER_LEASE, _SHORTEST_SECONDS)):
            if not self._beat():
                return

    def _beat(self) -> bool:
        """One heartbeat; returns whether another one makes sense."""
        try:
            lease = self._transport.heartbeat(
                self._task_id, self.state.value, self.step, self.steps
            )
        except RoundClosedError:
            self.void = True
        except ConnectionLostError as error:
            logger.info("heartbeat lost (task=%s): %s", self._task_id, error)
            return True
        except (CancelledError, IdentityError):
            # Interrupted, or to be enrolled anew: the worker's own next call meets the same.
            return False
        except LorikitError as error:
            logger.warning("heartbeat refused (task=%s): %s", self._task_id, error)
            return True
        else:
            self.void = not lease.go_on
            self._lease_seconds = lease.lease_seconds
        return not self.void
