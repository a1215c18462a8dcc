# SPDX-License-Identifier: Apache-2.0
"""The picture of a profile: stacked bars of memory by class, with the limit drawn in.

As SVG text for the page, which needs nothing, and as a PNG file, which needs matplotlib
(``pip install "lorikit[plots]"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lorikit.server.cli.display import MEGABYTE
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.cli.profile_plans import ClassPlan, Misfit

PARTS = (
    ("app_bytes", "app and SDK", "#8a97a6"),
    ("runtime_bytes", "runtime", "#5a6675"),
    ("mapped_bytes", "weights, mapped", "#9cc4f5"),
    ("packed_bytes", "weights, packed copy", "#1f6feb"),
    ("adapter_bytes", "adapter and optimiser", "#1a936f"),
    ("activation_bytes", "activations", "#d9822b"),
    ("workspace_bytes", "de-quantised for one use", "#f0c48a"),
)
"""Part of a footprint, what a reader is told it is, and its colour."""

LIMIT_COLOUR = "#c2364b"

_WIDTH, _LEFT, _RIGHT, _ROW, _BAR, _TOP, _BOTTOM = 900, 150, 170, 34, 18, 10, 40


@dataclass(frozen=True, slots=True)
class _Scale:
    """Bytes to pixels."""

    reach: float

    def __call__(self, count: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(count / self.reach, 1.0)


def svg(entries: Sequence[ClassPlan | Misfit]) -> str:
    """One row a class: parts stacked, measured peak as a mark, limit as a line."""
    scale = _Scale(_reach(entries))
    height = _TOP + _ROW * len(entries) + _BOTTOM
    rows = [_row(entry, _TOP + _ROW * i, scale) for i, entry in enumerate(entries)]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-label="Predicted peak memory by device class">'
        + "".join(rows)
        + _axis(scale, height)
        + "</svg>"
    )


def write_png(path: Path, title: str, entries: Sequence[ClassPlan | Misfit]) -> None:
    """Draw the same picture into a file.

    Raises:
        CommandError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError(
            ExitCode.MISSING_PART, 'a PNG needs matplotlib: pip install "lorikit[plots]"'
        ) from error
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(entries))
    left = [0.0] * len(entries)
    for part, name, colour in PARTS:
        sizes = [_part(entry, part) / MEGABYTE for entry in entries]
        if any(sizes):
            axes.barh(places, sizes, left=left, height=0.6, color=colour, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    reach = _reach(entries) / MEGABYTE
    for place, entry in zip(places, entries, strict=True):
        limit = entry.device_class.memory_limit_bytes / MEGABYTE
        if limit <= reach:
            ends = [place - 0.42, place + 0.42]
            axes.plot([limit, limit], ends, color=LIMIT_COLOUR, linewidth=2)
        measured = entry.measured if isinstance(entry, ClassPlan) else None
        if measured:
            axes.plot([measured.peak_bytes / MEGABYTE], [place], "kd", markersize=5)
        axes.annotate(
            _note(entry), (1.01, place), xycoords=("axes fraction", "data"), va="center", size=8
        )
    axes.plot([], [], color=LIMIT_COLOUR, linewidth=2, label="limit")
    if any(isinstance(entry, ClassPlan) and entry.measured for entry in entries):
        axes.plot([], [], "kd", markersize=5, label="measured peak")
    axes.set_yticks(list(places), [entry.device_class.name for entry in entries])
    axes.set_xlim(0, reach)
    axes.set_xlabel("MB, whole process")
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
    )
    figure.savefig(path, dpi=150)


def legend() -> str:
    """What the colours mean, as HTML."""
    keys = [*((name, colour) for _, name, colour in PARTS), ("limit", LIMIT_COLOUR)]
    return "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in keys
    )


def _reach(entries: Sequence[ClassPlan | Misfit]) -> float:
    """Bytes at the right edge: the largest peak, and each limit that is not far beyond it."""
    peaks = [_total(entry) for entry in entries]
    limits = [entry.device_class.memory_limit_bytes for entry in entries]
    largest = max(peaks, default=0) or min(limits, default=1)
    return 1.08 * max([largest, *(limit for limit in limits if limit <= 1.6 * largest)])


def _total(entry: ClassPlan | Misfit) -> float:
    if isinstance(entry, Misfit):
        return 0.0
    measured = entry.measured.peak_bytes if entry.measured else 0
    return float(max(entry.footprint.total_bytes, measured))


def _part(entry: ClassPlan | Misfit, part: str) -> float:
    return 0.0 if isinstance(entry, Misfit) else float(getattr(entry.footprint, part))


def _note(entry: ClassPlan | Misfit) -> str:
    limit = f"of {entry.device_class.memory_limit_bytes / MEGABYTE:,.0f} MB"
    if isinstance(entry, Misfit):
        return f"does not fit ({limit})"
    peak = entry.footprint.total_bytes / MEGABYTE
    if entry.measured is None:
        return f"{peak:,.0f} {limit}"
    error = entry.footprint.total_bytes / entry.measured.peak_bytes - 1
    return f"{peak:,.0f} {limit} ({error:+.0%})"


def _row(entry: ClassPlan | Misfit, top: float, scale: _Scale) -> str:
    middle = top + _ROW / 2
    out = [_text(_LEFT - 10, middle + 4, entry.device_class.name, "end")]
    total = 0.0
    for part, name, colour in PARTS:
        size = _part(entry, part)
        if size:
            tip = f"{entry.device_class.name}, {name}: {size / MEGABYTE:,.1f} MB"
            out.append(
                f'<rect x="{scale(total):.1f}" y="{middle - _BAR / 2:.1f}" '
                f'width="{scale(total + size) - scale(total):.1f}" height="{_BAR}" '
                f'fill="{colour}"><title>{escape(tip)}</title></rect>'
            )
        total += size
    if entry.device_class.memory_limit_bytes <= scale.reach:
        at = scale(entry.device_class.memory_limit_bytes)
        out.append(_line(at, middle - 14, middle + 14, LIMIT_COLOUR, 2.5))
    if isinstance(entry, ClassPlan) and entry.measured:
        at = scale(entry.measured.peak_bytes)
        out.append(f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="4" class="measured"/>')
    out.append(_text(_WIDTH - _RIGHT + 10, middle + 4, _note(entry), "start"))
    return "".join(out)


def _axis(scale: _Scale, height: float) -> str:
    step = _round_step(scale.reach / MEGABYTE / 6)
    out = []
    tick = 0.0
    while tick * MEGABYTE <= scale.reach:
        at = scale(tick * MEGABYTE)
        out.append(_line(at, height - _BOTTOM, height - _BOTTOM + 5, "#8a97a6", 1))
        out.append(_text(at, height - _BOTTOM + 20, f"{tick:,.0f} MB" if tick else "0", "middle"))
        tick += step
    return "".join(out)


def _round_step(wanted: float) -> float:
    """The next of 1, 2, 5, 10, ... that is at least the wanted step."""
    unit = 1.0
    while True:
        for factor in (1, 2, 5):
            if factor * unit >= wanted:
                return factor * unit
        unit *= 10


def _line(x: float, top: float, bottom: float, colour: str, width: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" '
        f'stroke="{colour}" stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
