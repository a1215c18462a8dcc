# SPDX-License-Identifier: Apache-2.0
"""How many bytes an allocator touches for a sequence of requests: onnxruntime's arena, replayed.

The live values of a graph are what it needs; what a process holds is more, since an arena splits,
rounds and places. Its rules are few and deterministic, so they can be replayed instead of guessed:

* requests are rounded up to 256 bytes and served from the smallest free chunk that is large enough;
* a chunk is split only if it is at least twice the request (or leaves 128 MB over);
* freed neighbours of one region merge; regions are never given back;
* a new region has 1 MB, and twice as much each time (up to 1 GB), or enough for the request.

Only pages that were handed out count: what a region reserves beyond them is never resident.

Source: onnxruntime's ``core/framework/bfc_arena.cc`` with the default options, the same from
release 1.15 to 1.31.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

_UNIT = 256
_PAGE = 4096
_FIRST_REGION = 1 << 20
_LARGEST_REGION = 1 << 30
_DEAD_BYTES = 128 << 20
"""What a chunk that is not split may leave unused at most."""

_GAP = 1 << 40
"""Address space between two regions, so that their chunks never touch."""

_REGIONS = 1 << 20
"""More regions than there will ever be."""

Event = tuple[int, int]
"""(buffer, bytes) asks for a buffer; (buffer, -1) gives it back."""


class Arena:
    """Chunks by address; a free one is also in a list ordered by size, then address."""

    def __init__(self) -> None:
        """Nothing is reserved yet."""
        self._next_region = _FIRST_REGION
        self._size: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._after: dict[int, int] = {}
        self._free: list[tuple[int, int]] = []
        self._is_free: set[int] = set()
        self._touched: list[np.ndarray[tuple[int], np.dtype[np.bool_]]] = []

    def touched_bytes(self) -> int:
        """Bytes of pages that were ever part of a request."""
        return _PAGE * sum(int(pages.sum()) for pages in self._touched)

    def region_bytes(self) -> tuple[int, ...]:
        """What was reserved, region by region."""
        return tuple(_PAGE * len(pages) for pages in self._touched)

    def allocate(self, size: int) -> int:
        """Address of a chunk of at least ``size`` bytes."""
        rounded = -(-max(size, 1) // _UNIT) * _UNIT
        place = bisect_left(self._free, (rounded, -1))
        if place == len(self._free):
            self._extend(rounded)
            place = bisect_left(self._free, (rounded, -1))
        chunk, address = self._free.pop(place)
        self._is_free.discard(address)
        if chunk >= 2 * rounded or chunk - rounded >= _DEAD_BYTES:
            self._split(address, rounded)
        self._touch(address, size)
        return address

    def release(self, address: int) -> None:
        """Give a chunk back and merge it with free neighbours."""
        after = self._after.get(address)
        if after is not None and after in self._is_free:
            self._take_out(after)
            self._merge(address, after)
        before = self._before.get(address)
        if before is not None and before in self._is_free:
            self._take_out(before)
            self._merge(before, address)
            address = before
        self._put_in(address)

    def _extend(self, rounded: int) -> None:
        grown = False
        while rounded > self._next_region:
            self._next_region *= 2
            grown = True
        size = self._next_region
        if not grown:
            self._next_region = min(2 * self._next_region, _LARGEST_REGION)
        # The system places each new mapping below the last one.
        address = (_REGIONS - len(self._touched)) * _GAP
        self._size[address] = size
        self._touched.append(np.zeros(-(-size // _PAGE), np.bool_))
        self._put_in(address)

    def _split(self, address: int, size: int) -> None:
        rest = address + size
        self._size[rest] = self._size[address] - size
        self._size[address] = size
        after = self._after.get(address)
        if after is not None:
            self._after[rest] = after
            self._before[after] = rest
        self._after[address] = rest
        self._before[rest] = address
        self._put_in(rest)

    def _merge(self, first: int, second: int) -> None:
        self._size[first] += self._size.pop(second)
        after = self._after.pop(second, None)
        del self._before[second]
        if after is None:
            del self._after[first]
        else:
            self._after[first] = after
            self._before[after] = first

    def _put_in(self, address: int) -> None:
        insort(self._free, (self._size[address], address))
        self._is_free.add(address)

    def _take_out(self, address: int) -> None:
        del self._free[bisect_left(self._free, (self._size[address], address))]
        self._is_free.discard(address)

    def _touch(self, address: int, size: int) -> None:
        below, offset = divmod(address, _GAP)
        last = (offset + max(size, 1) - 1) // _PAGE
        self._touched[_REGIONS - below][offset // _PAGE : last + 1] = True


def touched_bytes(*runs: Sequence[Event]) -> int:
    """Bytes that the arena touches over some runs of a graph.

    Args:
        runs: Requests and returns of each run, in order. What a run does not return are its
            results, which the caller holds until it has those of the next run.
    """
    arena = Arena()
    results: list[int] = []
    for run in runs:
        held: dict[int, int] = {}
        for buffer, size in run:
            if size >= 0:
                held[buffer] = arena.allocate(size)
            else:
                arena.release(held.pop(buffer))
        for address in results:
            arena.release(address)
        results = [*held.values()]
    return arena.touched_bytes()
