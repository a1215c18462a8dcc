# SPDX-License-Identifier: Apache-2.0
"""What a look at an installation found, in the one form that both ends print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """Works now, and may not tomorrow."""
    PROBLEM = "problem"
    """Does not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """``certificates``, ``clock``, ``disk``, ``engine``, ``versions``, ``connection``, ..."""
    health: Health
    sentence: str
    """What was found, in plain words."""
    remedy: str = ""
    """What to do; empty where there is nothing to do."""


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing keeps the installation from working."""
    return all(finding.health is not Health.PROBLEM for finding in findings)


def as_text(findings: Iterable[Finding]) -> str:
    """A line for each finding, and one for what to do about it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.health.value:8} {finding.check}: {finding.sentence}")
        if finding.remedy:
            lines.append(f"{'':8} -> {finding.remedy}")
    return "\n".join(lines)


def as_json(findings: Iterable[Finding]) -> str:
    """The same as one JSON object."""
    rows = [dataclasses.asdict(finding) for finding in findings]
    healthy = all(row["health"] != Health.PROBLEM for row in rows)
    return json.dumps({"healthy": healthy, "findings": rows}, indent=2)
