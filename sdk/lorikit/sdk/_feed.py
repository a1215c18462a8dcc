# SPDX-License-Identifier: Apache-2.0
"""Hands events to the app: to its callback, and to whoever iterates."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator

from lorikit.sdk._events import Event, State, StateChanged

logger = logging.getLogger(__name__)

_WAITING_EVENTS = 4096

Inbox = queue.Queue[Event | None]


class Feed:
    """One client's events; safe to use from several threads."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        """The callback is called in the thread in which the event happens."""
        self._on_event = on_event
        self._inboxes: list[Inbox] = []
        self._lock = threading.Lock()
        self._state = State.IDLE

    @property
    def state(self) -> State:
        """What the client is doing."""
        return self._state

    def enter(self, state: State) -> None:
        """Change the state, and say so if it is another one."""
        if state is not self._state:
            self._state = state
            self.emit(StateChanged(state=state))

    def emit(self, event: Event) -> None:
        """Hand out an event."""
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:  # the app's display must not cost the device its round
                logger.exception("the app's on_event failed")
        with self._lock:
            for inbox in self._inboxes:
                _put(inbox, event)

    def events(self) -> Iterator[Event]:
        """Events from now until the current (or else the next) run ends.

        A reader that falls behind by 4,096 events loses the oldest.
        """
        inbox: Inbox = queue.Queue(maxsize=_WAITING_EVENTS)
        with self._lock:
            self._inboxes.append(inbox)
        return self._read(inbox)

    def end(self) -> None:
        """Let every reader finish after what it has not read yet."""
        with self._lock:
            for inbox in self._inboxes:
                _put(inbox, None)
            self._inboxes.clear()

    def _read(self, inbox: Inbox) -> Iterator[Event]:
        try:
            while (event := inbox.get()) is not None:
                yield event
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._inboxes.remove(inbox)


def _put(inbox: Inbox, event: Event | None) -> None:
    while True:
        try:
            inbox.put_nowait(event)
            return
        except queue.Full:
            with contextlib.suppress(queue.Empty):  # a reader was faster
                inbox.get_nowait()
