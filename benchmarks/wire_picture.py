# SPDX-License-Identifier: Apache-2.0
"""Draws what ``wire.py federated`` found: accuracy against fp32, over the bytes of a round.

python benchmarks/wire_picture.py [--results docs/results/wire.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TARGETS = ((1 / 8, -0.3), (1 / 12, -0.5))
"""Share of fp32's bytes up, and the points of accuracy that it may cost."""

DIRECTIONS = (("up_of_fp32", "up", "#0072B2", "o"), ("down_of_fp32", "down", "#D55E00", "s"))


def draw(summary: list[dict[str, Any]], picture: Path) -> None:
    """A panel a data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted({row["data"] for row in summary})
    figure, panels = plt.subplots(
        1, len(names), figsize=(7.5 * len(names), 4.8), squeeze=False, sharey=True
    )
    for panel, name in zip(panels[0], names, strict=True):
        rows = [row for row in summary if row["data"] == name and row["scheme"] != "fp32"]
        for field, title, colour, marker in DIRECTIONS:
            panel.errorbar(
                [row[field] for row in rows],
                [row["points_against_fp32"] for row in rows],
                yerr=[row["points_sd"] or 0 for row in rows],
                fmt=marker,
                color=colour,
                elinewidth=0.8,
                capsize=2,
                label=title,
            )
        ordered = sorted(rows, key=lambda row: row["up_of_fp32"])
        for place, row in enumerate(ordered):
            panel.annotate(
                row["scheme"],
                (row["up_of_fp32"], row["points_against_fp32"]),
                xytext=(0, 14 + 15 * (place % 5)),
                textcoords="offset points",
                fontsize=8,
                ha="center",
                arrowprops={"arrowstyle": "-", "color": "#cccccc", "lw": 0.6},
            )
        for share, points in TARGETS:
            panel.plot([0.005, share, share], [points, points, 3], color="#999999", lw=0.8, ls=":")
        panel.axhline(0, color="#333333", lw=0.8)
        panel.set_xscale("log", base=2)
        ticks = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
        panel.set_xticks(ticks, [f"1/{round(1 / tick)}" for tick in ticks])
        panel.set_xlim(1 / 80, 0.7)
        panel.set_xlabel("bytes of a round, of fp32's")
        seeds = {row["seeds"] for row in rows}
        count = "/".join(map(str, sorted(seeds)))
        panel.set_title(f"{name}, {count} seed{'s' * (count != '1')}")
        panel.grid(color="#e5e5e5", lw=0.6)
        panel.set_axisbelow(True)
    lowest = min(row["points_against_fp32"] - (row["points_sd"] or 0) for row in summary)
    panels[0][0].set_ylim(min(-1.0, lowest - 0.2), 1.0)
    panels[0][0].set_ylabel("points of accuracy against fp32")
    panels[0][0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def table(summary: list[dict[str, Any]]) -> str:
    """The same in Markdown."""
    lines = [
        "| data | scheme | seeds | accuracy | points against fp32 | bytes up | bytes down |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.1f}"
        points = row["points_against_fp32"]
        against = "" if row["points_sd"] is None else f" ± {row['points_sd']:.1f}"
        lines.append(
            f"| {row['data']} | {row['scheme']} | {row['seeds']} "
            f"| {100 * row['accuracy_mean']:.1f}{spread} | {points:+.1f}{against} "
            f"| {row['bytes_up']:,.0f} ({row['up_of_fp32']:.1%}) "
            f"| {row['bytes_down']:,.0f} ({row['down_of_fp32']:.1%}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("docs/results/wire.json"))
    options = parser.parse_args()
    summary = json.loads(options.results.read_text())["federated"]["summary"]
    draw(summary, options.results.parent.parent / "images" / "wire.png")
    print(table(summary))


if __name__ == "__main__":
    main()
