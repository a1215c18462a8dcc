# SPDX-License-Identifier: Apache-2.0
"""What a device says about itself and about its work, as typed values.

The fields mean what their namesakes in ``v1/device_service.proto`` mean; zero is "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """A runtime that can train on the device."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a device can do."""

    device_class: str = ""
    memory_limit_bytes: int
    """Most resident memory the app may use; above zero."""
    memory_total_bytes: int = 0
    cores: int = 1
    speed_gflops: float = 0.0
    storage_free_bytes: int = 0
    platform: str = ""
    sdk_version: str = ""
    engines: tuple[EngineInfo, ...] = ()
    """Best first."""
    plan_version: int = 0
    operations: tuple[str, ...] = ()
    """``name@version`` of each operation the SDK can carry out."""
    codecs: tuple[str, ...] = ()
    memory_baseline_bytes: int = 0
    """Resident memory of the app before any training, without pages of files it can read again."""
    download_bytes_per_second: float = 0.0
    upload_bytes_per_second: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """Numbers a device measured while it worked; never data."""

    examples: int = 0
    """Examples seen, counted with repetition."""
    dataset_size: int = 0
    first_loss: float = 0.0
    last_loss: float = 0.0
    accuracy: float = 0.0
    training_seconds: float = 0.0
    download_seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Peak resident memory of the process, from the operating system."""
    anonymous_memory_bytes: int = 0
    engine: str = ""
    bytes_down: int = 0
    steps: int = 0
    rank: int = 0
    """Largest rank after the operations."""
