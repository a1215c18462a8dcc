# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorikit.proto.plan import PLAN_VERSION, WIRE_FEATURE
from lorikit.quantization import CODECS
from lorikit.sdk._operations import operation_names
from lorikit.sdk._profile import control_group_files, measured_speed, profile
from lorikit.sdk.engines import available_engines


def test_profile_says_what_the_sdk_can_do(tmp_path: Path) -> None:
    seen = profile(store=tmp_path / "not" / "there", speed_gflops=3.5, device_class="phone-4gb")

    assert seen.device_class == "phone-4gb"
    assert 0 < seen.memory_limit_bytes <= seen.memory_total_bytes
    assert seen.cores >= 1
    assert seen.speed_gflops == 3.5
    assert seen.storage_free_bytes > 0
    assert seen.plan_version == PLAN_VERSION
    assert seen.operations == operation_names()
    assert seen.codecs == (*CODECS, WIRE_FEATURE)
    assert seen.engines == available_engines()
    assert seen.sdk_version


def test_given_limits_win() -> None:
    seen = profile(memory_limit_bytes=123_000_000, threads=3, probe_speed=False)
    assert (seen.memory_limit_bytes, seen.cores, seen.speed_gflops) == (123_000_000, 3, 0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit and /proc are Linux's")
def test_limit_of_the_process_is_seen() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (700_000_000, -1));"
        "from lorikit.sdk._profile import profile;"
        "print(profile(probe_speed=False).memory_limit_bytes)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert int(output) == 700_000_000


def test_limits_of_parent_control_groups_count() -> None:
    files = [str(path) for path in control_group_files("0::/user.slice/app\n3:cpu:/x\n")]
    assert files == [
        "/sys/fs/cgroup/user.slice/app/memory.max",
        "/sys/fs/cgroup/user.slice/memory.max",
        "/sys/fs/cgroup/memory.max",
    ]
    files = [str(path) for path in control_group_files("4:cpu,memory:/\n")]
    assert files == ["/sys/fs/cgroup/memory/memory.limit_in_bytes"]


@pytest.mark.parametrize("option", ["memory_limit_bytes", "threads"])
def test_limits_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        profile(**{option: 0}, probe_speed=False)  # type: ignore[arg-type]


def test_speed_is_the_best_product_of_the_probe() -> None:
    ticks = iter([0.0, 1.0, 1.5, 1.5, 1.75, 2.0, 2.5])  # products of 0.5 s, 0.25 s, 0.5 s
    speed = measured_speed(seconds=2.5, clock=lambda: next(ticks))
    assert speed == pytest.approx(2 * 192**3 / 0.25 / 1e9)
