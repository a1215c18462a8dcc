# SPDX-License-Identifier: Apache-2.0
"""What the operating system says about the memory of a process.

Linux gives the figures under ``/proc``; where there is none, a figure is zero, which means unknown.
"""

from __future__ import annotations

from pathlib import Path


def peak_memory(process: int | str = "self") -> int:
    """Largest resident memory a process has had, bytes; a running or just ended process."""
    return _status_bytes(process, "VmHWM")


def resident_memory(process: int | str = "self") -> int:
    """Resident memory of a process now, bytes."""
    return _status_bytes(process, "VmRSS")


def _status_bytes(process: int | str, field: str) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0
