# SPDX-License-Identifier: Apache-2.0
"""Gives back pages of mapped files that were read once: code that only starts things, weights.

Half of what a device process holds before it trains are pages of libraries that ran once: imports,
the registration of the runtime's kernels, a tokeniser. They count as resident until the system
wants the memory, and an app's limit does not wait for that.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(/.*)?", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A stretch of addresses, as ``/proc/self/smaps`` has it."""

    start: int
    end: int
    permissions: str
    """Such as ``r-xp``: readable, not writable, executable, private."""
    path: str
    """The file behind it; empty for none."""
    resident_bytes: int
    own_bytes: int
    """The part that no file holds any more: written to, in memory or swapped out."""


def release_file_pages(folder: Path | None = None) -> int:
    """Let go of pages of loaded libraries, and of files in a folder, that equal their file.

    The system keeps them in its file cache as long as nothing else needs the room, and a page that
    is read again is mapped again with its neighbours: a microsecond, unless the cache dropped it.
    Afterwards the process holds what it works with. Only memory that nobody can have written to
    is touched: mappings that are not writable and have no page of their own. A library that another
    thread is loading has no writable part yet, and is left alone.

    Args:
        folder: Files in it are mapped for reading alone (a package's blobs); None for none.

    Returns:
        Resident bytes before of what was let go; 0 on systems other than Linux.

    Source:
        madvise(2): after ``MADV_DONTNEED`` a private mapping of a file has the file's contents.
    """
    if not sys.platform.startswith("linux"):
        return 0
    try:
        mappings = list(_mappings(_SMAPS.read_text()))
    except OSError:  # a sandbox may hide it, and then pages stay
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(
        each.resident_bytes
        for each in _released(mappings, folder)
        if libc.madvise(each.start, each.end - each.start, mmap.MADV_DONTNEED) == 0
    )


def _released(mappings: list[Mapping], folder: Path | None) -> Iterator[Mapping]:
    """Those whose pages can be had again from their files."""
    executable = {each.path for each in mappings if "x" in each.permissions}
    writable = {each.path for each in mappings if "w" in each.permissions}
    loaded = executable & writable
    for each in mappings:
        is_known = each.path in loaded or Path(each.path).parent == folder
        is_file = each.path and each.permissions in ("r-xp", "r--p") and not each.own_bytes
        if is_known and is_file and each.resident_bytes:
            yield each


def _mappings(smaps: str) -> Iterator[Mapping]:
    """The mappings of a text in the format of ``/proc/PID/smaps``, see proc(5)."""
    starts = list(_MAPPING.finditer(smaps))
    ends = [match.start() for match in starts[1:]] + [len(smaps)]
    for match, end in zip(starts, ends, strict=True):
        fields = (line.split() for line in smaps[match.end() : end].splitlines())
        sizes = {f[0]: int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}
        yield Mapping(
            start=int(match[1], 16),
            end=int(match[2], 16),
            permissions=match[3],
            path=match[4] or "",
            resident_bytes=sizes.get("Rss:", 0),
            own_bytes=sizes.get("Anonymous:", 0) + sizes.get("Swap:", 0),
        )
