# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
import threading

import psutil
import pytest

from lorikit.sdk._config import parse_bytes
from lorikit.sdk._memory import MemoryUse, MemoryWatch, memory_use

linux = pytest.mark.skipif(sys.platform != "linux", reason="figures come from /proc")


@linux
def test_figures_are_those_of_the_operating_system() -> None:
    use = memory_use()

    assert use.resident_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert 0 < use.anonymous_bytes < use.resident_bytes <= use.peak_resident_bytes


@linux
def test_peak_remembers_memory_that_was_given_back() -> None:
    before = memory_use().peak_resident_bytes
    block = bytearray(before + (64 << 20))
    del block

    use = memory_use()

    assert use.peak_resident_bytes > before + (60 << 20)
    assert use.resident_bytes < use.peak_resident_bytes - (32 << 20)


LIMITED = """
from lorikit.sdk import limit_memory, memory_use
limit_memory(memory_use().anonymous_bytes + 200_000_000)
kept = bytearray(50_000_000)
try:
    bytearray(300_000_000)
except MemoryError:
    print("refused")
"""


@linux
def test_kernel_refuses_memory_beyond_the_limit() -> None:
    out = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True
    )

    assert out.stdout == "refused\n"


def test_watch_keeps_the_peak_and_reports_the_excess() -> None:
    amounts = iter([10, 80, 30])
    last = threading.Event()
    exceeded: list[int] = []

    def measure() -> MemoryUse:
        amount = next(amounts, None)
        if amount is None:
            last.set()
            amount = 20
        return MemoryUse(resident_bytes=amount, peak_resident_bytes=80, anonymous_bytes=amount // 2)

    with MemoryWatch(
        interval_seconds=0.001,
        limit_bytes=50,
        on_exceeded=lambda use: exceeded.append(use.resident_bytes),
        measure=measure,
    ) as watch:
        assert last.wait(10)

    assert watch.peak_anonymous_bytes == 40
    assert exceeded == [80]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256MB", 256_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("64kib", 65_536),
        ("7", 7),
        (12, 12),
    ],
)
def test_sizes_are_read(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "12 apples", "-3MB", "0", 0, -1, "1e3"])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)
