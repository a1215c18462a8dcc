# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from lorikit.sdk._pages import _mappings, _released, release_file_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="smaps is a file of Linux")

SIZE = 4 << 20


def mapped(path: Path, protection: int) -> mmap.mmap:
    """A private mapping of a file of ``SIZE`` bytes of 7."""
    path.write_bytes(bytes([7]) * SIZE)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=protection)


def resident_bytes(path: Path) -> int:
    smaps = Path("/proc/self/smaps").read_text()
    return sum(each.resident_bytes for each in _mappings(smaps) if each.path == str(path))


@linux
def test_pages_that_were_read_are_let_go_and_can_be_read_again(tmp_path: Path) -> None:
    weights = mapped(tmp_path / "weights", mmap.PROT_READ)
    assert sum(weights[:: mmap.PAGESIZE]) == 7 * SIZE // mmap.PAGESIZE
    assert resident_bytes(tmp_path / "weights") == SIZE

    assert release_file_pages(tmp_path) >= SIZE

    assert resident_bytes(tmp_path / "weights") == 0
    assert weights[:] == bytes([7]) * SIZE


@linux
def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    theirs = mapped(tmp_path / "theirs", mmap.PROT_READ)
    assert theirs[:] == bytes([7]) * SIZE

    release_file_pages(tmp_path / "ours")

    assert resident_bytes(tmp_path / "theirs") == SIZE


@linux
def test_what_was_written_stays_even_where_it_is_now_read_only(tmp_path: Path) -> None:
    part = mapped(tmp_path / "part", mmap.PROT_READ | mmap.PROT_WRITE)
    part[SIZE // 2] = 9
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(part))
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(address, SIZE, mmap.PROT_READ) == 0

    release_file_pages(tmp_path)

    assert part[SIZE // 2] == 9
    assert part[0] == 7


@linux
def test_libraries_go_on_working(tmp_path: Path) -> None:
    released = release_file_pages(tmp_path)

    assert released > 1 << 20
    matrix = np.array([[2.0, 1.0], [1.0, 3.0]])
    np.testing.assert_allclose(matrix @ np.linalg.inv(matrix), np.eye(2), atol=1e-12)


def entry(addresses: str, permissions: str, path: str, own: int = 0, swapped: int = 0) -> str:
    return (
        f"{addresses} {permissions} 00000000 08:01 1234    {path}\n"
        f"Size:   64 kB\nRss:    32 kB\nAnonymous:   {own} kB\nSwap:   {swapped} kB\n"
        "VmFlags: rd mr mw me\n"
    )


def test_only_clean_parts_of_loaded_libraries_are_let_go() -> None:
    smaps = "".join(
        [
            entry("1000-2000", "r--p", "/lib/a.so"),
            entry("2000-3000", "r-xp", "/lib/a.so"),
            entry("3000-4000", "r--p", "/lib/a.so", own=4),
            entry("4000-5000", "r--p", "/lib/a.so", swapped=4),
            entry("5000-6000", "rw-p", "/lib/a.so"),
            entry("6000-9000", "r-xp", "/lib/being loaded.so"),
            entry("9000-a000", "r--s", "/blobs/shared"),
            entry("a000-b000", "r--p", "/blobs/weights"),
            entry("b000-c000", "rw-p", ""),
        ]
    )

    released = list(_released(list(_mappings(smaps)), Path("/blobs")))

    assert [(each.start, each.path) for each in released] == [
        (0x1000, "/lib/a.so"),
        (0x2000, "/lib/a.so"),
        (0xA000, "/blobs/weights"),
    ]
    assert released[0].end == 0x2000
    assert released[0].resident_bytes == 32 * 1024
