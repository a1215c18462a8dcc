# SPDX-License-Identifier: Apache-2.0
"""How often somebody may call: a bucket of tokens for each."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_KEYS = 100_000


class RateLimiter:
    """Token buckets by key; a key that was not seen for long starts with a full one."""

    def __init__(
        self, *, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args are calls per second, calls at once, and a clock in seconds."""
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, key: str) -> float:
        """Take a token; 0 where there was one, else the time until there is."""
        now = self._clock()
        held, seen = self._buckets.pop(key, (self._burst, now))
        held = min(self._burst, held + (now - seen) * self._rate)
        allowed = held >= 1.0
        self._buckets[key] = (held - 1.0 if allowed else held, now)
        if len(self._buckets) > _MOST_KEYS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - held) / self._rate
