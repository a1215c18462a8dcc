# SPDX-License-Identifier: Apache-2.0
"""``lorikit compile``: a model folder becomes a package in a store folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorikit.proto.manifest import Manifest, Task
from lorikit.server.cli.display import (
    Format,
    FormatOption,
    megabytes,
    print_json,
    print_table,
    progress,
)
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.cli.profile_plans import BASELINE_BYTES
from lorikit.server.planner.step import StepShape

if TYPE_CHECKING:
    from lorikit.server.compile import Package

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


def compile_model(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder.")],
    store: Annotated[Path, typer.Option(help="Folder the package's blobs go to.")],
    task: Annotated[
        str, typer.Option(help="What it is trained to do, for example causal-language-modeling.")
    ] = "sequence-classification",
    precision: Annotated[
        str, typer.Option(help="Base weights: nf4, int4, int8, fp16 or fp32.")
    ] = "nf4",
    adapter: Annotated[
        str, typer.Option(help="lora, dora, ia3, prompt, bottleneck, bitfit or head.")
    ] = "lora",
    adapter_size: Annotated[
        int, typer.Option(min=1, help="Tokens of a soft prompt, or width of a bottleneck.")
    ] = 16,
    targets: Annotated[
        str,
        typer.Option(help="Modules that get it, by the end of their name, with commas."),
    ] = "",
    rank: Annotated[int, typer.Option(min=1, help="Rank the memory is predicted for.")] = 8,
    labels: Annotated[str, typer.Option(help="Class names, with commas.")] = "",
    num_labels: Annotated[
        int, typer.Option(min=0, help="Number of classes, where they have no names.")
    ] = 0,
    lowest_trained_layer: Annotated[
        int, typer.Option(min=0, help="Layers below it are not trained.")
    ] = 0,
    kept_layers: Annotated[
        str, typer.Option(help="Layers of a sub-model, with commas; empty for all.")
    ] = "",
    recompute: Annotated[
        str, typer.Option(help="Layers whose activations are made again, with commas.")
    ] = "",
    kernels: Annotated[str, typer.Option(help="lean or fast.")] = "lean",
    length: Annotated[int, typer.Option(min=1, help="Tokens the memory is predicted for.")] = 128,
    output: FormatOption = Format.TEXT,
) -> None:
    """Turn a model folder into a package: graphs, quantised weights, manifest.

    Example: lorikit compile ./all-MiniLM-L6-v2 --store ./packages --precision nf4 --num-labels 150
    """
    classes = () if task.endswith("language-modeling") else _labels(labels, num_labels)
    if not (model / "config.json").is_file():
        raise CommandError(
            ExitCode.NOT_FOUND,
            f"{model} is not a model folder (no config.json); give a folder as saved by "
            "save_pretrained()",
        )
    with progress(f"Loading {model.name}") as announce:
        # Loads torch, which takes seconds: only when there is something to compile.
        from lorikit.server.compile import Compiler
        from lorikit.server.compile.insertion import AdapterConfig
        from lorikit.server.store.blobs import FolderBlobs

        compiler = Compiler(
            model,
            Task(kind=task, labels=classes),
            adapter=AdapterConfig(kind=adapter, targets=_split(targets), size=adapter_size),
            blobs=FolderBlobs(store),
            progress=announce,
        )
        recomputed = _integers("recompute", recompute) or ()
        package = compiler.package(
            precision=precision,
            lowest_trained_layer=lowest_trained_layer,
            kept_layers=_integers("kept-layers", kept_layers),
            recomputed_layers=recomputed,
            kernels=kernels,
        )
        announce("Predicting memory")
        memory = {
            micro_batch: compiler.predicted_peak_memory(
                StepShape(
                    precision=precision,
                    lowest_trained_layer=lowest_trained_layer,
                    kept_layers=package.manifest.kept_layers,
                    rank=rank,
                    micro_batch=micro_batch,
                    length=length,
                    recomputed_layers=recomputed,
                    kernels=kernels,
                ),
                baseline_bytes=BASELINE_BYTES,
            )
            for micro_batch in _MICRO_BATCHES
        }
    facts = _facts(package, memory, rank=rank, length=length)
    if output is Format.JSON:
        print_json(facts)
    else:
        _print(package.manifest, facts, memory)


def _facts(
    package: Package, memory: dict[int, int], *, rank: int, length: int
) -> dict[str, object]:
    manifest = package.manifest
    return {
        "manifest": package.ref.digest,
        "model": manifest.model,
        "precision": manifest.precision,
        "lowest_trained_layer": manifest.lowest_trained_layer,
        "kept_layers": list(manifest.kept_layers),
        "bytes": package.ref.size + sum(blob.size for blob in manifest.blobs()),
        "blobs": [
            {"kind": kind, "digest": digest, "bytes": size}
            for kind, digest, size in _blobs(manifest)
        ],
        "codecs": [
            {"codec": codec, "tensors": tensors, "bytes": size}
            for codec, tensors, size in _codecs(manifest)
        ],
        "rank": rank,
        "length": length,
        "baseline_bytes": BASELINE_BYTES,
        "predicted_peak_memory_bytes": {str(batch): size for batch, size in memory.items()},
    }


def _print(manifest: Manifest, facts: dict[str, object], memory: dict[int, int]) -> None:
    title = f"{manifest.model} as {manifest.precision}, manifest {facts['manifest']}"
    blobs = [(kind, digest[:16], f"{size:,}") for kind, digest, size in _blobs(manifest)]
    print_table(("blob", "SHA-256 (start)", "bytes"), blobs, title=title)
    codecs = [(codec, tensors, f"{size:,}") for codec, tensors, size in _codecs(manifest)]
    print_table(("codec as written", "tensors", "bytes"), codecs, title="Frozen weights")
    peaks = [(batch, megabytes(size)) for batch, size in memory.items()]
    print_table(
        ("micro-batch", "predicted peak"),
        peaks,
        title=f"Whole device process, rank {facts['rank']}, {facts['length']} tokens",
    )


def _blobs(manifest: Manifest) -> list[tuple[str, str, int]]:
    named = [(f"graph {graph.name} ({graph.runtime})", graph.blob) for graph in manifest.graphs]
    weights = [("weights", blob) for blob in manifest.weight_blobs]
    others = [("tokenizer", manifest.tokenizer), ("probe", manifest.probe)]
    present = [(kind, blob) for kind, blob in others if blob is not None]
    return [(kind, blob.digest, blob.size) for kind, blob in [*named, *weights, *present]]


def _codecs(manifest: Manifest) -> list[tuple[str, int, int]]:
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for weight in manifest.weights:
        tensors[weight.codec] += 1
        sizes[weight.codec] += weight.nbytes
    return [(codec, tensors[codec], size) for codec, size in sizes.most_common()]


def _labels(names: str, count: int) -> tuple[str, ...]:
    given = _split(names)
    if bool(given) == bool(count):
        raise CommandError(
            ExitCode.USAGE, "give either --labels a,b,c or --num-labels N: the task needs classes"
        )
    return given or tuple(f"label_{index}" for index in range(count))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(option: str, text: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in _split(text)) or None
    except ValueError as error:
        raise CommandError(
            ExitCode.USAGE, f"--{option} must be whole numbers with commas, got {text!r}"
        ) from error
