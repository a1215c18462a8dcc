# SPDX-License-Identifier: Apache-2.0
"""Waiting for something to change, by name, within one event loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict


class Signals:
    """A counter per key that can be waited on.

    Read ``version``, look at the world, then ``wait`` with that version: a change in between ends
    the wait at once, so that none is missed.
    """

    def __init__(self) -> None:
        """All counters stand at zero."""
        self._versions: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def version(self, key: str) -> int:
        """How often the key has changed."""
        return self._versions[key]

    def notify(self, *keys: str) -> None:
        """Count a change of each key and wake those who wait for it."""
        for key in keys:
            self._versions[key] += 1
            for future in self._waiting.pop(key, ()):
                if not future.done():
                    future.set_result(None)

    async def wait(self, key: str, seen: int, timeout: float) -> bool:
        """Wait until the key changes past ``seen``; False when ``timeout`` seconds went by."""
        if self._versions[key] != seen:
            return True
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(future)
        try:
            async with asyncio.timeout(max(timeout, 0)):
                await future
        except TimeoutError:
            return False
        finally:
            self._waiting.get(key, set()).discard(future)
        return True

    def notify_all(self) -> None:
        """Wake everyone, for a shutdown."""
        self.notify(*list(self._waiting))
