# SPDX-License-Identifier: Apache-2.0
"""Predicted and measured peak memory of every built-in device class on four models.

For each model the planner gives every class a plan, as ``lorikit profile`` does; each plan is
carried out in a device process of its own that is held to the limit of its class, and the operating
system says what the process held at most. Two ratios follow: measured over predicted, and the same
with the correction that the other runs of the class teach (never the run's own).

    python benchmarks/predictions.py [--only MODEL ...] [--classes CLASS ...] [--models FOLDER]

``--models`` is a folder with real models, named as here; those that it lacks are made with random
weights in the shape of the real ones. Packages lie in ``--work`` and stay there: a plan that has
not changed is not compiled again, and what the output has is not measured again. Remove the output
and the folder to measure another version of the compiler or of the SDK.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step import CAUSAL, IMAGE, LABELS, RANK, TARGETS, TEXT, make_model

if TYPE_CHECKING:
    from lorikit.server.cli.device_classes import DeviceClass

STEPS = 6
"""Optimiser steps of a process. The peak is reached in the first ones, but a table of words is
read a few rows a step."""


@dataclass(frozen=True)
class Case:
    """One optimiser step of a model."""

    model: str
    task: str
    batch: int
    length: int

    @property
    def title(self) -> str:
        examples = f"{self.batch} images" if self.task == IMAGE else f"{self.batch} x {self.length}"
        return f"{self.model} {examples}"


CASES = (
    Case("minilm", TEXT, 1, 128),
    Case("minilm", TEXT, 8, 128),
    Case("smollm", CAUSAL, 1, 128),
    Case("vit", IMAGE, 8, 1),
    Case("tinyllama", CAUSAL, 1, 128),
    Case("tinyllama", CAUSAL, 1, 512),
)
PRECISIONS = ("fp32", "fp16", "int8", "int4", "nf4")
PARTS = ("app", "runtime", "mapped", "packed", "adapter", "activation", "workspace")


def model_folder(name: str, real: Path | None, work: Path) -> Path:
    """The real model where there is one, else one of its shape, made once."""
    if real is not None and (real / name / "config.json").is_file():
        return real / name
    made = work / "models"
    if (made / name / "config.json").is_file():
        return made / name
    folder = make_model(name, made)
    if folder.parent == made:
        give_every_word(folder)
    return folder


def give_every_word(folder: Path) -> None:
    """A tokeniser with as many words as the table has rows, so that all rows may be read."""
    import tokenizers

    size = json.loads((folder / "config.json").read_text()).get("vocab_size")
    if size is None:  # a model of images
        return
    vocabulary = {word: n for n, word in enumerate(["[UNK]", *(f"w{n}" for n in range(1, size))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def prepare(name: str, options: argparse.Namespace) -> None:
    """Plan the classes for a model's cases and compile the plans; adds to ``work/NAME.json``."""
    from lorikit.proto.manifest import Task
    from lorikit.server.cli.profile_measuring import rehearsal
    from lorikit.server.cli.profile_plans import ClassPlan, Work, facts, plan_for
    from lorikit.server.compile import Compiler
    from lorikit.server.planner import Planner
    from lorikit.server.store.blobs import FolderBlobs

    work = options.work
    cases = [case for case in CASES if case.model == name]
    kind, folder = cases[0].task, work / "packages" / name
    plans = {place(row): row for row in read_plans(work, name)}
    labels = () if kind == CAUSAL else tuple(f"c{i}" for i in range(LABELS))
    compiler = Compiler(
        model_folder(name, options.models, work),
        Task(kind=kind, labels=labels),
        targets=TARGETS[kind],
        blobs=FolderBlobs(folder),
        progress=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )
    for case in cases:
        step = Work(rank=RANK, batch_size=case.batch, length=case.length)
        planner = Planner(
            compiler,
            precisions=PRECISIONS,
            batch_size=case.batch,
            max_length=case.length,
            max_rank=RANK,
        )
        for device_class in chosen_classes(options):
            entry = plan_for(compiler, planner, device_class, step)
            row = {"case": case.title, **facts(entry)}
            print(f"  {line(row)}", file=sys.stderr, flush=True)
            known = plans.get(place(row), {})
            if known.get("plan") == row["plan"] and not options.renew:
                row |= {n: known[n] for n in ("settings",) if n in known}
            elif isinstance(entry, ClassPlan):
                settings = rehearsal(compiler, entry, step, folder=folder, steps=STEPS)
                row["settings"] = {**settings, "rows": kept_rows(settings, case)}
            plans[place(row)] = row
            fresh = work / f"{name}.json.part"
            fresh.write_text(json.dumps([*plans.values()]))
            fresh.replace(work / f"{name}.json")


def chosen_classes(options: argparse.Namespace) -> list[DeviceClass]:
    from lorikit.server.cli.device_classes import built_in_classes

    every = built_in_classes()
    return [every[name] for name in options.classes or every]


def place(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["case"]), str(row["class"])


def read_plans(work: Path, name: str) -> list[dict[str, Any]]:
    path = work / f"{name}.json"
    plans: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return plans


def kept_rows(settings: Mapping[str, Any], case: Case) -> str:
    """The rows of a rehearsal under a name that the next case does not write over."""
    if not settings["rows"]:
        return ""
    path = Path(settings["rows"])
    kept = path.with_name(f"rows-{case.batch}x{case.length}.jsonl")
    kept.write_bytes(path.read_bytes())
    return str(kept)


def measured_case(work: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Carry a plan out in a process held to the limit of its class.

    Where the plan does not keep to it, the process runs again without one: how far off the
    prediction is has to be known then above all.
    """
    from lorikit.server.cli.exit_codes import CommandError
    from lorikit.server.cli.profile_measuring import measure

    settings, path, kept = row["settings"], work / "rehearsal.json", True
    try:
        found = measure(settings, path, str(row["class"]))
    except CommandError:
        kept = False
        found = measure({**settings, "memory_limit": 0}, path, str(row["class"]))
    return {
        "measured_peak_memory_bytes": found.peak_bytes,
        "measured_anonymous_memory_bytes": found.anonymous_bytes,
        "measured_seconds_per_step": found.seconds_per_step,
        "measured_within_limit": kept,
    }


def corrected(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows with the prediction that the other runs of their class correct."""
    from lorikit.server.planner import MemoryCorrections

    for row in rows:
        known = MemoryCorrections()
        for other in rows:
            if other is not row and other["class"] == row["class"] and is_measured(other):
                known.observe(
                    row["class"],
                    predicted_bytes=other["predicted_peak_memory_bytes"],
                    measured_bytes=other["measured_peak_memory_bytes"],
                )
        if is_measured(row):
            predicted, peak = row["predicted_peak_memory_bytes"], row["measured_peak_memory_bytes"]
            factor = known.factor(row["class"])
            yield {
                **row,
                "ratio": peak / predicted,
                "learnt_factor": factor,
                "ratio_with_correction": peak / (predicted * factor),
            }
        else:
            yield dict(row)


def is_measured(row: Mapping[str, Any]) -> bool:
    return bool(row.get("measured_peak_memory_bytes"))


def line(row: Mapping[str, Any]) -> str:
    """A row of the report as a row of a Markdown table."""
    if not row["fits"]:
        return f"| {row['case']} | {row['class']} | does not fit: {row['remedy']} | | | | |"
    plan = row["plan"]
    text = f"{plan['precision']}{', fast' if plan['kernels'] == 'fast' else ''}"
    text += f", {len(plan['trained_layers'])} of {len(plan['kept_layers'])} layers"
    if plan["recomputed_layers"]:
        text += f", {len(plan['recomputed_layers'])} recomputed"
    text += f", micro-batch {plan['micro_batch']}"
    cells = [row["case"], row["class"], text, f"{row['predicted_peak_memory_bytes'] / 1e6:.0f} MB"]
    if is_measured(row):
        cells.append(f"{row['measured_peak_memory_bytes'] / 1e6:.0f} MB")
    if "ratio" in row:
        cells += [f"{row['ratio']:.3f}", f"{row['ratio_with_correction']:.3f}"]
    return f"| {' | '.join(cells)} |"


def key(row: Mapping[str, Any]) -> str:
    """What a measurement is of: the plan, its package and the limit."""
    settings = {n: v for n, v in row["settings"].items() if n not in ("folder", "rows")}
    return json.dumps([row["case"], row["class"], settings], sort_keys=True)


def load(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    facts = {
        "command": "python benchmarks/predictions.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "steps": STEPS,
        "rank": RANK,
        "precisions": PRECISIONS,
    }
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
    parts.append('"rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    fresh.replace(path)


def measure_all(options: argparse.Namespace) -> None:
    for name in options.only:
        rows = load(options.output)
        done = {key(row): row for row in rows if is_measured(row)}
        if not options.planned:
            subprocess.run([sys.executable, *sys.argv, "--prepare", name], check=True)
        chosen = {device_class.name for device_class in chosen_classes(options)}
        for plan in read_plans(options.work, name):
            if plan["class"] not in chosen:
                continue
            row = dict(plan)
            if row["fits"]:
                old = done.get(key(row))
                found = measured_case(options.work, row) if old is None else old
                row |= {n: v for n, v in found.items() if n.startswith("measured_")}
            print(line(row), flush=True)
            rows = [*(other for other in rows if place(other) != place(row)), row]
            save(options.output, rows)


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    from lorikit.server.cli.device_classes import built_in_classes

    titles, names = [case.title for case in CASES], [*built_in_classes()]
    return sorted(rows, key=lambda row: (titles.index(row["case"]), names.index(row["class"])))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far the predictions lie from what was measured."""
    found = [row for row in rows if "ratio" in row]
    if not found:
        return "nothing is measured"
    text = []
    for name, bound in (("ratio", 0.10), ("ratio_with_correction", 0.05)):
        off = [row[name] - 1 for row in found]
        within = sum(abs(each) <= bound for each in off)
        text.append(
            f"{name}: {min(off):+.1%} to {max(off):+.1%}, "
            f"{within} of {len(found)} within {bound:.0%}"
        )
    return "\n".join(text)


def draw(rows: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Measured over predicted: a column a model, a row a class; with the correction, hollow."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    classes = list(dict.fromkeys(row["class"] for row in rows))
    titles = [case.title for case in CASES if any(row["case"] == case.title for row in rows)]
    figure, columns = plt.subplots(
        1, len(titles), figsize=(2.6 + 2 * len(titles), 4.6), sharey=True, squeeze=False
    )
    for place, title in zip(columns[0], titles, strict=True):
        place.axvspan(0.9, 1.1, color="#eef3f8", zorder=0)
        place.axvspan(0.95, 1.05, color="#d6e4f2", zorder=0)
        place.axvline(1, color="#8a97a6", lw=1)
        for row in rows:
            if row["case"] != title:
                continue
            at = classes.index(row["class"])
            if "ratio" in row:
                place.plot(row["ratio"], at, "o", color="#0072B2", ms=6)
                place.plot(row["ratio_with_correction"], at, "o", mfc="none", mec="#D55E00", ms=9)
            elif not row["fits"]:
                place.text(1, at, "does not fit", ha="center", va="center", size=8, color="#5a6675")
        place.set_title(title, size=10)
        place.set_xlim(0.84, 1.16)
        place.set_xticks([0.9, 1, 1.1])
    columns[0][0].set_yticks(range(len(classes)), classes)
    columns[0][0].invert_yaxis()
    ends = [
        plt.Line2D([], [], marker="o", ls="", color="#0072B2", label="as predicted"),
        plt.Line2D(
            [], [], marker="o", ls="", mfc="none", mec="#D55E00", ms=9,
            label="with what the other runs of the class teach",
        ),
    ]  # fmt: skip
    figure.legend(handles=ends, loc="lower center", ncols=2, frameon=False)
    figure.suptitle("Measured over predicted peak memory of the device process")
    figure.subplots_adjust(left=0.12, right=0.99, top=0.85, bottom=0.16, wspace=0.08)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = list(dict.fromkeys(case.model for case in CASES))
    parser.add_argument("--only", nargs="+", choices=models, default=models)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "predictions"))
    parser.add_argument("--classes", nargs="+", metavar="CLASS")
    parser.add_argument("--renew", action="store_true", help="compile anew what is compiled")
    parser.add_argument("--planned", action="store_true", help="only measure what is compiled")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("docs/results/predictions.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/predictions.png"))
    parser.add_argument("--prepare", choices=models)
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.prepare:
        prepare(options.prepare, options)
        return
    if not options.draw:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        options.work.mkdir(parents=True, exist_ok=True)
        measure_all(options)
    rows = [*corrected(in_order(load(options.output)))]
    save(options.output, rows)
    print("\n".join(line(row) for row in rows if "ratio" in row))
    print(summary(rows))
    draw(rows, options.picture)


if __name__ == "__main__":
    main()
