# SPDX-License-Identifier: Apache-2.0
"""Device classes by name, from TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lorikit.proto.device import Profile
from lorikit.server.cli.exit_codes import CommandError, ExitCode

_BUILT_IN = "device_classes.toml"
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(|KB|MB|GB|KIB|MIB|GIB)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """A kind of device, as far as planning goes."""

    name: str
    memory_limit_bytes: int
    """Most resident memory the app may use."""
    cores: int
    speed_gflops: float
    """float32 matrix products."""
    source: str
    """Where the numbers come from."""

    def profile(self, *, baseline_bytes: int) -> Profile:
        """What a device of this class would report.

        Args:
            baseline_bytes: Resident memory of the app before any training.
        """
        return Profile(
            device_class=self.name,
            memory_limit_bytes=self.memory_limit_bytes,
            cores=self.cores,
            speed_gflops=self.speed_gflops,
            memory_baseline_bytes=baseline_bytes,
        )


def built_in_classes() -> dict[str, DeviceClass]:
    """The classes that come with Lorikit, by name."""
    text = resources.files("lorikit.server.cli").joinpath(_BUILT_IN).read_text(encoding="utf-8")
    return parse_classes(text, _BUILT_IN)


def read_classes(path: Path) -> dict[str, DeviceClass]:
    """Classes of a file of the user's own, by name."""
    return parse_classes(path.read_text(encoding="utf-8"), str(path))


def parse_classes(text: str, origin: str) -> dict[str, DeviceClass]:
    """Classes from TOML: one table a class.

    Args:
        text: The TOML.
        origin: Its name in error messages.

    Raises:
        CommandError: CONFIG; names the class and the field.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CommandError(ExitCode.CONFIG, f"{origin} is not valid TOML: {error}") from error
    return {name: _device_class(name, table, origin) for name, table in tables.items()}


def parse_bytes(size: str) -> int:
    """Bytes of a text such as ``256MB`` or ``1.5GiB``; ValueError for anything else."""
    match = _BYTES.fullmatch(size.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise ValueError(f"not a size above zero: {size!r}; write for example 256MB or 1.5GiB")
    return count


def _device_class(name: str, table: Mapping[str, Any], origin: str) -> DeviceClass:
    known = {"memory_limit", "cores", "speed_gflops", "source"}
    if not isinstance(table, dict) or "memory_limit" not in table or table.keys() - known:
        raise CommandError(
            ExitCode.CONFIG,
            f"{origin}: [{name}] needs memory_limit and may have cores, speed_gflops and source, "
            f"got {sorted(table) if isinstance(table, dict) else table!r}",
        )
    try:
        return DeviceClass(
            name=name,
            memory_limit_bytes=parse_bytes(str(table["memory_limit"])),
            cores=int(table.get("cores", 1)),
            speed_gflops=float(table.get("speed_gflops", 0.0)),
            source=str(table.get("source", "")),
        )
    except (TypeError, ValueError) as error:
        raise CommandError(ExitCode.CONFIG, f"{origin}: [{name}]: {error}") from error
