# SPDX-License-Identifier: Apache-2.0
"""Lets a server kill itself at a named point, so that tests show what a crash there does.

Off unless the environment variable ``LORIKIT_FAILPOINT`` names a point: ``round.aggregating`` for
the first time it is reached, ``round.aggregating:2`` for the second. The points:

``storing.STATE``   the work of a round's state is done, what follows it is not stored yet
``round.STATE``     that a round is in STATE is stored, its work has not begun
``storing.RUNSTATE``, ``run.RUNSTATE``   the same of a run: ``running``, ``finished``, ...
``update.kept``     an update is checked and stored, its receipt is not
``update.accepted`` the receipt is stored, the device has not been told
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable

Reach = Callable[[str], None]
"""Called with the name of a point when it is reached."""


class Failpoint:
    """The point at which this process ends as if the power failed; callable as ``Reach``."""

    def __init__(self, setting: str = "") -> None:
        """``NAME`` or ``NAME:COUNT``; empty for none.

        Raises:
            ValueError: The count is no positive number.
        """
        self._name, _, count = setting.partition(":")
        if count and not (count.isdecimal() and int(count) > 0):
            raise ValueError(f"failpoint must be NAME or NAME:COUNT, got {setting!r}")
        self._count = int(count or 1)
        self._reached: Counter[str] = Counter()

    def __call__(self, name: str) -> None:
        """Count the point, and end the process without any clean-up if it is the one."""
        if name != self._name:
            return
        self._reached[name] += 1
        if self._reached[name] == self._count:
            os.kill(os.getpid(), signal.SIGKILL)


def unreached(name: str) -> None:
    """No failpoint."""
