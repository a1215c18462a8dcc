# SPDX-License-Identifier: Apache-2.0
"""How far each precision pulls the average: kept by round, and as a picture of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lorikit.server.report_charts import WIDTH

_PANELS = (
    ("Error of the base at its layers' outputs", "base_error", "base_error_after"),
    ("Repair of the base in the adapter", "repair", "repair_after"),
    ("Pull on the average", "pull", "pull_after"),
)
"""Title of each panel, and the fields of a round's drift before and after correction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRow:
    """One precision over the rounds of a run, each number a mean over rounds."""

    precision: str
    devices: int
    """In the last round it took part in."""
    means: Mapping[str, float]
    """By field of ``ClassDrift``."""


def write_drift(folder: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep a round's drift in the folder of its run, in one step."""
    path = _file(folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(list(rows)), encoding="utf-8")
    partial.replace(path)


def read_drift(folder: Path, number: int) -> list[dict[str, Any]]:
    """A round's drift by precision; empty where all devices hold the same base."""
    path = _file(folder, number)
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_bytes())
    return rows


def drift_rows(rounds: Sequence[Mapping[str, Any]]) -> list[DriftRow]:
    """Means over the rounds that have drift, the finest base first; empty without any."""
    by_precision: dict[str, list[Mapping[str, Any]]] = {}
    for entry in rounds:
        for row in entry.get("drift") or ():
            by_precision.setdefault(str(row["precision"]), []).append(row)
    fields = [field for _, *both in _PANELS for field in both]
    rows = [
        DriftRow(
            precision=precision,
            devices=int(found[-1].get("devices", 0)),
            means={f: sum(float(row.get(f) or 0) for row in found) / len(found) for f in fields},
        )
        for precision, found in by_precision.items()
    ]
    return sorted(rows, key=lambda row: row.means["base_error"])


def drift_chart(rows: Sequence[DriftRow]) -> str:
    """Three panels, each with two bars per precision: before correction and after."""
    row_height, left, gap, top, bottom = 44, 82, 26, 34, 8
    width = (WIDTH - left - gap * (len(_PANELS) - 1)) / len(_PANELS)
    height = top + row_height * len(rows) + bottom
    parts = []
    for number, row in enumerate(rows):
        y = top + row_height * (number + 0.5)
        parts.append(_text(left - 12, y, row.precision, "row end"))
        count = f"{row.devices} device{'s' * (row.devices != 1)}"
        parts.append(_text(left - 12, y + 14, count, "axis end"))
    for panel, (title, before, after) in enumerate(_PANELS):
        start = left + panel * (width + gap)
        reach = max((max(row.means[before], row.means[after]) for row in rows), default=0.0)
        parts.append(_text(start, 16, title, "axis"))
        for number, row in enumerate(rows):
            y = top + row_height * number + 6
            for place, (field, style) in enumerate(((before, "reference"), (after, "measured"))):
                value = row.means[field]
                share = value / reach if reach > 0 and math.isfinite(value) else 0.0
                length = share * (width - 52)
                when = "after" if place else "before"
                tip = f"{title}, {row.precision}, {when} correction: {100 * value:.2f} %"
                at = y + 16 * place
                parts.append(
                    f'<rect class="bar {style}" x="{start:.1f}" y="{at:.1f}" '
                    f'width="{length:.1f}" height="13" rx="2"><title>{escape(tip)}</title></rect>'
                )
                written = f"{100 * value:.{1 if value >= 0.01 else 2}f} %"
                parts.append(_text(start + length + 6, at + 11, written, "axis"))
    label = "How far each precision pulls the average, before and after correction"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _file(folder: Path, number: int) -> Path:
    return folder / "drift" / f"round-{number:04d}.json"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
