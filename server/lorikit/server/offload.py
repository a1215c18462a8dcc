# SPDX-License-Identifier: Apache-2.0
"""Blocking calls in threads, so that the event loop goes on answering devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Offload:
    """Four queues: the database, files, checks of updates, and heavy work.

    The database has one thread, so that its calls happen one after the other in the order they
    were made. So do checks, because each holds a whole update. A call that was started is
    finished, even when the one who waits for it goes away.
    """

    def __init__(self, *, file_threads: int = 4, work_threads: int = 2) -> None:
        """Threads start when they are first needed."""
        self._database = ThreadPoolExecutor(1, thread_name_prefix="lorikit-database")
        self._files = ThreadPoolExecutor(file_threads, thread_name_prefix="lorikit-files")
        self._checks = ThreadPoolExecutor(1, thread_name_prefix="lorikit-checks")
        self._work = ThreadPoolExecutor(work_threads, thread_name_prefix="lorikit-work")

    async def database(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run one store call."""
        return await _run(self._database, partial(call, *args, **kwargs))

    async def file(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run a short call that reads or writes a file."""
        return await _run(self._files, partial(call, *args, **kwargs))

    async def check(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run a call that holds a whole update in memory."""
        return await _run(self._checks, partial(call, *args, **kwargs))

    async def work(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run a call that may take long."""
        return await _run(self._work, partial(call, *args, **kwargs))

    def close(self) -> None:
        """Wait for the calls that run; those that did not start are dropped."""
        for executor in (self._work, self._checks, self._files, self._database):
            executor.shutdown(wait=True, cancel_futures=True)


async def _run(executor: ThreadPoolExecutor, call: Callable[[], _R]) -> _R:
    return await asyncio.get_running_loop().run_in_executor(executor, call)
