# SPDX-License-Identifier: Apache-2.0
"""What memory the process uses, in the operating system's own figures, and how to bound it."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lorikit.sdk._errors import OutOfMemoryError

if sys.platform != "win32":
    import resource

_STATUS = Path("/proc/self/status")
_SIGNS = ("can't start new thread", "cannot allocate memory", "cannot map", "failed to map")
_HEADROOM_BYTES = 16 << 20
"""Connecting takes that much; with less, gRPC waits for threads that it never gets."""

_RESERVED_SHARE = 1.5
"""Reserved private memory allowed per byte of the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Memory of this process; zero is "this system does not say"."""

    resident_bytes: int
    peak_resident_bytes: int
    """Largest ``resident_bytes`` since the process started."""
    anonymous_bytes: int
    """The part of it that no file backs: what the system cannot drop and read again."""


def memory_use() -> MemoryUse:
    """Memory of this process now: from /proc on Linux, from ``getrusage`` elsewhere."""
    if _STATUS.exists():
        sizes = _proc_sizes(_STATUS.read_text())
        return MemoryUse(
            resident_bytes=sizes.get("VmRSS", 0),
            peak_resident_bytes=sizes.get("VmHWM", 0),
            anonymous_bytes=sizes.get("RssAnon", 0),
        )
    if sys.platform == "win32":
        return MemoryUse(resident_bytes=0, peak_resident_bytes=0, anonymous_bytes=0)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryUse(resident_bytes=0, peak_resident_bytes=peak, anonymous_bytes=0)


def limit_memory(limit_bytes: int) -> None:
    """Have the kernel refuse private writable memory far beyond the limit, for good.

    The kernel counts what is *reserved*: heap, anonymous mappings, stacks of threads; memory-mapped
    weights do not count, they are pages of a file. An allocation beyond it fails, which Python
    and the runtimes turn into an exception instead of a kill. Runtimes reserve more than they
    touch (onnxruntime's arena grows in powers of two), so the kernel's bound is
    ``_RESERVED_SHARE`` times the limit, and what is reserved but untouched when this is called
    (stacks and buffers of libraries) comes on top; later threads reserve their whole stack, so keep
    stacks small (see ``small_stacks``). Resident memory as a whole has no kernel limit for a
    single process; a ``MemoryWatch`` holds that to the limit itself.

    Raises:
        OutOfMemoryError: The process takes about that much already.
        OSError: The system has no such limit.
    """
    if sys.platform == "win32":
        raise OSError(
            "Windows has no memory limit that a process sets for itself; use a job object"
        )
    sizes = _proc_sizes(_STATUS.read_text()) if _STATUS.exists() else {}
    resident = sizes.get("VmRSS", 0)
    if resident + _HEADROOM_BYTES > limit_bytes:
        raise OutOfMemoryError(
            f"the process takes {resident} bytes before any work; a limit of {limit_bytes} bytes "
            f"is too small, allow at least {resident + _HEADROOM_BYTES}"
        )
    untouched = max(0, sizes.get("VmData", 0) - sizes.get("RssAnon", 0))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = int(_RESERVED_SHARE * limit_bytes) + untouched
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, wanted))


def lacks_memory(error: Exception) -> bool:
    """Whether an error means that the system gave no more memory, in any of its disguises."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError | ImportError):
        return any(sign in str(error) for sign in _SIGNS)
    return isinstance(error, MemoryError)


def small_stacks(stack_bytes: int = 1 << 20) -> bool:
    """Give threads of programs started from here small stacks.

    The C library reads the size once, when a program starts, so a process that wants it for itself
    starts itself anew.

    Returns:
        Whether anything changed, so that a new start is worth it.
    """
    if sys.platform == "win32":
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY and soft <= stack_bytes:
        return False
    resource.setrlimit(resource.RLIMIT_STACK, (stack_bytes, hard))
    return True


class MemoryWatch:
    """Looks at memory every so often, in a thread of its own, while it is entered.

    Peaks shorter than the interval can be missed; ``MemoryUse.peak_resident_bytes`` is the
    kernel's own and misses nothing.
    """

    def __init__(
        self,
        *,
        interval_seconds: float = 0.05,
        limit_bytes: int | None = None,
        on_exceeded: Callable[[MemoryUse], None] = lambda use: None,
        measure: Callable[[], MemoryUse] = memory_use,
    ) -> None:
        """Args are the interval, a bound on resident memory, and what happens beyond it."""
        self.peak_anonymous_bytes = 0
        self._interval = interval_seconds
        self._limit = limit_bytes
        self._on_exceeded = on_exceeded
        self._measure = measure
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorikit-memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._done.is_set():
            self._look()
            self._done.wait(self._interval)

    def _look(self) -> None:
        use = self._measure()
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, use.anonymous_bytes)
        if self._limit is not None and use.resident_bytes > self._limit:
            self._on_exceeded(use)


def _proc_sizes(status: str) -> dict[str, int]:
    """Sizes in bytes by name, from lines such as ``VmRSS:     1234 kB``."""
    fields = (line.split() for line in status.splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}
