# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report, as SVG text that needs nothing but a browser.

Colours and fonts are classes of the style sheet in ``report_template.html``; positions are in
pixels of a drawing ``WIDTH`` wide, which the page scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 760
"""Width of every drawing."""

_LABEL_GAP = 15.0
"""Least distance between the baselines of two labels that stand under each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A quantity over rounds."""

    name: str
    values: Sequence[float]
    rounds: Sequence[int]
    style: str
    """CSS class of the line: ``main`` or ``other``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A single value to compare curves with."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Peak memory of one device class, bytes; zero where unknown."""

    name: str
    note: str
    measured: float
    predicted: float = 0
    budget: float = 0
    style: str = "measured"
    """CSS class of the bar: ``measured`` or ``reference``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """What one device trained."""

    name: str
    note: str
    share: Mapping[int, float]
    """Share of the device's rounds in which a layer was trained, by layer."""
    rank: Mapping[int, int]
    """Largest rank a layer was trained at, by layer."""
    held: frozenset[int] = field(default_factory=frozenset)
    """Layers the device's model had, trained or not."""


def accuracy_chart(curves: Sequence[Curve], levels: Sequence[Level]) -> str:
    """Accuracy over rounds, with reference levels as dashed lines named on the right.

    The axis ends at 100 % and starts at the last multiple of 10 % that leaves every value room.
    """
    height, left, right, top, bottom = 320, 46, 190, 14, 34
    last = max((number for curve in curves for number in curve.rounds), default=1)
    first = min((number for curve in curves for number in curve.rounds), default=0)
    span = max(last - first, 1)
    values = [*(v for curve in curves for v in curve.values), *(level.value for level in levels)]
    floor = max(0.0, math.floor(10 * (min(values, default=0.0) - 0.03)) / 10)

    def x(number: float) -> float:
        return left + (WIDTH - left - right) * (number - first) / span

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - floor) / (1 - floor)

    parts = []
    for tick in (floor + step for step in _ticks(1 - floor, 5)):
        parts.append(_line(left, y(tick), WIDTH - right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, f"{100 * tick:.0f} %", "axis end"))
    for number in range(first, last + 1, max(1, math.ceil(span / 12))):
        parts.append(_text(x(number), height - 12, str(number + 1), "axis middle"))
    parts.append(_text(left, height - 12, "round", "axis end", dx=-14))
    for level in levels:
        parts.append(_line(left, y(level.value), WIDTH - right, y(level.value), "level"))
    for curve in curves:
        points = [(x(n), y(v)) for n, v in zip(curve.rounds, curve.values, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="curve {curve.style}" points="{path}"/>')
        for (px, py), n, v in zip(points, curve.rounds, curve.values, strict=True):
            tip = f"{curve.name}, round {n + 1}: {100 * v:.1f} %"
            parts.append(
                f'<circle class="dot {curve.style}" cx="{px:.1f}" cy="{py:.1f}" r="4">'
                f"<title>{escape(tip)}</title></circle>"
            )
    named = [(c.name, c.values[-1], f"name {c.style}") for c in curves if c.values]
    named += [(level.name, level.value, "name") for level in levels]
    for (name, value, style), at in zip(named, _spread([y(v) for _, v, _ in named]), strict=True):
        parts.append(_text(WIDTH - right + 10, at + 4, f"{100 * value:.1f} %  {name}", style))
    return _svg(height, parts, "Accuracy on the test set after each round")


def memory_chart(rows: Sequence[MemoryRow]) -> str:
    """Measured peak as a bar, predicted peak as a mark, budget as a line, one row a class."""
    row_height, left, right, top, bottom = 50, 178, 128, 26, 30
    height = top + row_height * len(rows) + bottom
    reach = max((max(row.measured, row.predicted) for row in rows), default=1) * 1.12
    near = [row.budget for row in rows if row.budget <= 1.5 * reach]
    reach = max([reach, *[budget * 1.06 for budget in near]])

    def x(count: float) -> float:
        return left + (WIDTH - left - right) * count / reach

    parts = []
    for tick in _ticks(reach / 1e6, 6):
        at = x(tick * 1e6)
        parts.append(_line(at, top - 6, at, height - bottom, "grid"))
        parts.append(_text(at, height - 12, f"{tick:,.0f} MB" if tick else "0", "axis middle"))
    for number, row in enumerate(rows):
        middle = top + row_height * (number + 0.5)
        parts.extend(_memory_row(row, middle, x, reach, WIDTH - right))
    return _svg(height, parts, "Peak memory of the whole device process, by class")


def _memory_row(
    row: MemoryRow, middle: float, x: Callable[[float], float], reach: float, edge: float
) -> list[str]:
    tip = f"{row.name}: measured {_mb(row.measured)}"
    parts = [
        _text(x(0) - 12, middle - 2, row.name, "row end"),
        _text(x(0) - 12, middle + 13, row.note, "axis end"),
        f'<rect class="bar {row.style}" x="{x(0):.1f}" y="{middle - 11:.1f}" '
        f'width="{max(x(row.measured) - x(0), 0):.1f}" height="22" rx="3">'
        f"<title>{escape(tip)}</title></rect>",
        _text(edge + 10, middle - 2, _mb(row.measured) if row.measured else "no figure", "value"),
    ]
    if row.predicted:
        at = x(row.predicted)
        parts.append(_line(at, middle - 16, at, middle + 16, "predicted"))
        error = f" ({100 * (row.predicted / row.measured - 1):+.0f} %)" if row.measured else ""
        parts.append(_text(edge + 10, middle + 13, f"pred. {_mb(row.predicted)}{error}", "axis"))
    if 0 < row.budget <= reach:
        at = x(row.budget)
        parts.append(_line(at, middle - 19, at, middle + 19, "budget"))
        before = row.budget > 0.8 * reach
        style = "axis end" if before else "axis"
        parts.append(
            _text(at, middle + 4, f"budget {_mb(row.budget)}", style, dx=-6 if before else 6)
        )
    elif row.budget:
        parts.append(_text(edge - 4, middle + 4, f"budget {_mb(row.budget)} →", "axis end"))
    return parts


def bytes_chart(rounds: Sequence[int], sizes: Sequence[float], *, style: str, title: str) -> str:
    """Bytes of all devices together, one column a round."""
    width, height, left, right, top, bottom = WIDTH // 2 - 10, 210, 62, 8, 16, 30
    reach = max([*sizes, 1.0]) * 1.08
    unit, name = (1e6, "MB") if reach >= 1e6 else (1e3, "kB")
    step = (width - left - right) / max(len(sizes), 1)

    def y(count: float) -> float:
        return height - bottom - (height - top - bottom) * count / reach

    parts = []
    for tick in _ticks(reach / unit, 4):
        at = y(tick * unit)
        parts.append(_line(left, at, width - right, at, "grid"))
        parts.append(_text(left - 8, at + 4, f"{_short(tick)} {name}", "axis end"))
    every = max(1, math.ceil(len(sizes) / 10))
    for index, (number, size) in enumerate(zip(rounds, sizes, strict=True)):
        at = left + step * (index + 0.14)
        parts.append(
            f'<rect class="bar {style}" x="{at:.1f}" y="{y(size):.1f}" '
            f'width="{min(step * 0.72, 42):.1f}" height="{y(0) - y(size):.1f}" rx="2">'
            f"<title>round {number + 1}: {size:,.0f} bytes {title}</title></rect>"
        )
        if index % every == 0:
            middle = at + min(step * 0.72, 42) / 2
            parts.append(_text(middle, height - 12, str(number + 1), "axis middle"))
    return _svg(height, parts, f"Bytes {title} in each round", width=width)


def layer_chart(rows: Sequence[LayerRow], *, layers: int) -> str:
    """Devices by layers: colour is the rank, size of the square the share of rounds."""
    cell_width, cell_height, left, top = _cell_width(layers), 26, 190, 30
    height = top + cell_height * len(rows) + 8
    highest = max((rank for row in rows for rank in row.rank.values()), default=1)
    parts = [
        _text(left + cell_width * (layer + 0.5), top - 10, f"layer {layer}", "axis middle")
        if layers <= 8
        else _text(left + cell_width * (layer + 0.5), top - 10, str(layer), "axis middle")
        for layer in range(layers)
    ]
    for number, row in enumerate(rows):
        y = top + cell_height * number
        parts.append(_text(left - 12, y + 17, row.name, "row end"))
        parts.append(_text(left + cell_width * layers + 10, y + 17, row.note, "axis"))
        for layer in range(layers):
            x = left + cell_width * layer
            parts.extend(_layer_cell(row, layer, x, y, cell_width, cell_height, highest))
    return _svg(height, parts, "Layers each device trained, and at which rank")


def _cell_width(layers: int) -> float:
    return min(72.0, (WIDTH - 190 - 130) / max(layers, 1))


def _layer_cell(
    row: LayerRow, layer: int, x: float, y: float, width: float, height: float, highest: int
) -> list[str]:
    share = row.share.get(layer, 0.0)
    outline = (
        f'<rect class="cell {"held" if layer in row.held else "absent"}" x="{x + 1.5:.1f}" '
        f'y="{y + 1.5:.1f}" width="{width - 3:.1f}" height="{height - 3:.1f}" rx="3"/>'
    )
    if not share:
        return [outline]
    rank = row.rank.get(layer, 0)
    scale = math.sqrt(share)
    inner_width, inner_height = (width - 3) * scale, (height - 3) * scale
    tip = f"{row.name}, layer {layer}: rank {rank}, trained in {100 * share:.0f} % of its rounds"
    # Opacity by rank: 0.35 at the smallest, 1 at the largest in the run.
    opacity = 0.35 + 0.65 * rank / max(highest, 1)
    strong = "on-dark" if opacity > 0.7 and share > 0.4 else "on-light"
    return [
        outline,
        f'<rect class="cell trained" fill-opacity="{opacity:.2f}" '
        f'x="{x + (width - inner_width) / 2:.1f}" y="{y + (height - inner_height) / 2:.1f}" '
        f'width="{inner_width:.1f}" height="{inner_height:.1f}" rx="3">'
        f"<title>{escape(tip)}</title></rect>",
        _text(x + width / 2, y + height / 2 + 4, str(rank), f"rank middle {strong}"),
    ]


def _svg(height: float, parts: Sequence[str], title: str, *, width: float = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, style: str, *, dx: float = 0) -> str:
    return f'<text class="{style}" x="{x + dx:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _spread(positions: Sequence[float]) -> list[float]:
    """Positions moved apart, in their order, until no two are closer than the label gap."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + _LABEL_GAP)
    return placed


def _ticks(reach: float, about: int) -> list[float]:
    """Round numbers from zero to at most ``reach``, about that many steps."""
    raw = max(reach, 1e-9) / about
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(magnitude * m for m in (1, 2, 2.5, 5, 10) if magnitude * m >= raw * 0.999)
    return [step * index for index in range(int(reach / step + 1e-9) + 1)]


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
