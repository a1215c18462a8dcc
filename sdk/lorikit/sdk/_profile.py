# SPDX-License-Identifier: Apache-2.0
"""What this device can do: the profile that a server plans for.

Reading it loads no engine and takes a fraction of a second; the speed probe is the longest part.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lorikit.proto.device import Profile
from lorikit.proto.plan import PLAN_VERSION, WIRE_FEATURE
from lorikit.quantization import CODECS
from lorikit.sdk._memory import memory_use
from lorikit.sdk._operations import operation_names
from lorikit.sdk._pages import release_file_pages
from lorikit.sdk.engines import available_engines

if sys.platform != "win32":
    import resource

_CGROUP_ROOT = Path("/sys/fs/cgroup")

_PROBE_SIZE = 192
"""Rows and columns of the matrices of the speed probe: 0.45 MB together."""


def profile(
    *,
    memory_limit_bytes: int | None = None,
    device_class: str = "",
    threads: int | None = None,
    store: Path | None = None,
    probe_speed: bool = True,
    speed_gflops: float | None = None,
) -> Profile:
    """Look at the device.

    Args:
        memory_limit_bytes: Most resident memory the app may use; None for the tightest limit the
            operating system names, or all memory of the device.
        device_class: Class the app gives itself; empty lets the server choose.
        threads: Processor threads training may use; None for all that the process may run on.
        store: Folder whose free space counts; None for the working folder.
        probe_speed: Whether to measure the speed, which takes 0.1 s.
        speed_gflops: A speed measured before; spares the probe.

    Raises:
        ValueError: A limit or a number of threads below 1.
    """
    total = _memory_total()
    limit = memory_limit_bytes if memory_limit_bytes is not None else _memory_limit(total)
    cores = threads if threads is not None else _cores()
    if limit < 1 or cores < 1:
        raise ValueError(
            f"memory limit and threads must be at least 1, got {limit} bytes and {cores} threads"
        )
    if speed_gflops is None:
        speed_gflops = measured_speed() if probe_speed else 0.0
    return Profile(
        device_class=device_class,
        memory_limit_bytes=limit,
        memory_total_bytes=total,
        cores=cores,
        speed_gflops=speed_gflops,
        storage_free_bytes=_storage_free(store),
        platform=f"{platform.system().lower()}-{platform.machine().lower()}",
        sdk_version=_sdk_version(),
        engines=available_engines(),
        plan_version=PLAN_VERSION,
        operations=operation_names(),
        codecs=(*CODECS, WIRE_FEATURE),
        memory_baseline_bytes=_baseline(),
    )


def measured_speed(
    *, seconds: float = 0.1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Speed of float32 matrix products in numpy, GFLOP/s: the best of many within the time.

    The best, because other work on the device only ever makes a product slower. numpy's own
    threads take part, so it is the speed of the process, not of one core.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, _PROBE_SIZE, _PROBE_SIZE), dtype=np.float32)
    out = np.empty_like(a)
    best = float("inf")
    end = clock() + seconds
    while True:
        start = clock()
        np.matmul(a, b, out=out)
        now = clock()
        best = min(best, now - start)
        if now >= end:
            return 2 * _PROBE_SIZE**3 / max(best, 1e-9) / 1e9


def _baseline() -> int:
    """Resident bytes of the app without what an engine has it let go of."""
    release_file_pages()
    return memory_use().resident_bytes


def _memory_total() -> int:
    """Memory of the device, bytes; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _memory_limit(total: int) -> int:
    """The tightest limit the system names, or all memory."""
    limits = [limit for limit in (*_control_group_limits(), *_process_limits()) if limit > 0]
    if total:
        limits.append(total)
    if not limits:
        raise ValueError("the system names no memory size: pass memory_limit_bytes")
    return min(limits)


def _control_group_limits() -> list[int]:
    texts = (_text(path) for path in control_group_files(_text(Path("/proc/self/cgroup"))))
    return [int(text) for text in texts if text.isdigit()]


def control_group_files(membership: str) -> list[Path]:
    """Files that may hold a memory limit of the process, its control groups' and their parents'.

    Args:
        membership: Content of ``/proc/self/cgroup``: lines ``number:controllers:group``.
    """
    files = []
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = _CGROUP_ROOT, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUP_ROOT / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = root / group.lstrip("/")
        files += [
            own / name,
            *(parent / name for parent in own.parents if root in (parent, *parent.parents)),
        ]
    return files


def _process_limits() -> list[int]:
    if sys.platform == "win32":
        return []
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    soft = (resource.getrlimit(kind)[0] for kind in kinds)
    return [limit for limit in soft if limit != resource.RLIM_INFINITY]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _storage_free(folder: Path | None) -> int:
    """Free bytes on the disk that has the folder, or would have it."""
    path = (folder or Path.cwd()).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _sdk_version() -> str:
    try:
        return importlib.metadata.version("lorikit")
    except importlib.metadata.PackageNotFoundError:
        return ""
