# SPDX-License-Identifier: Apache-2.0
"""``lorikit profile``: which device classes can train a model, and how."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorikit.proto.manifest import Task
from lorikit.server.cli.device_classes import DeviceClass, built_in_classes, read_classes
from lorikit.server.cli.display import (
    Announce,
    Format,
    FormatOption,
    megabytes,
    print_json,
    print_table,
    progress,
)
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.cli.profile_measuring import rehearsed
from lorikit.server.cli.profile_page import page
from lorikit.server.cli.profile_picture import write_png
from lorikit.server.cli.profile_plans import (
    BASELINE_BYTES,
    ClassPlan,
    Misfit,
    Work,
    facts,
    plan_for,
)
from lorikit.server.config import RunConfig

if TYPE_CHECKING:
    from lorikit.server.compile import Compiler

_WITHOUT_LABELS = ("causal-language-modeling", "masked-language-modeling")


def profile(
    model: Annotated[Path, typer.Option(help="Hugging Face model folder.")],
    names: Annotated[
        list[str] | None, typer.Option("--class", help="Only these classes; may be repeated.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(exists=True, help="Your own classes, TOML, besides ours.")
    ] = None,
    task: Annotated[str, typer.Option(help="What the model is trained to do.")] = (
        "sequence-classification"
    ),
    labels: Annotated[int, typer.Option(min=2, help="Number of classes of the task.")] = 2,
    targets: Annotated[
        str, typer.Option(help="Modules that get LoRA, with commas; empty for the usual ones.")
    ] = "",
    rank: Annotated[int, typer.Option(min=1, help="Largest LoRA rank.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per optimiser step.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Longest input in tokens.")] = 128,
    precisions: Annotated[
        str, typer.Option(help="Allowed precisions of the base, the best first, with commas.")
    ] = "",
    measure: Annotated[
        bool, typer.Option("--measure", help="Rehearse each plan in a process under its limit.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write a picture to this PNG file (needs matplotlib).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page to this file; it opens without a network.")
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show for each device class whether a model's training fits, with which plan and memory.

    Example: lorikit profile --model ./all-MiniLM-L6-v2 --labels 150 --measure --html profile.html
    """
    chosen = _chosen(names or (), classes)
    if not (model / "config.json").is_file():
        raise CommandError(
            ExitCode.NOT_FOUND, f"{model} is not a Hugging Face model folder (no config.json)"
        )
    work = Work(rank=rank, batch_size=batch_size, length=length)
    wanted = Task(
        kind=task,
        labels=()
        if task in _WITHOUT_LABELS
        else tuple(f"label_{index}" for index in range(labels)),
    )
    with progress(f"Loading {model.name}") as announce, tempfile.TemporaryDirectory() as folder:
        # Loads torch, which takes seconds: only when there is something to plan.
        from lorikit.server.compile import Compiler
        from lorikit.server.store.blobs import FolderBlobs

        compiler = Compiler(
            model,
            wanted,
            targets=_split(targets),
            blobs=FolderBlobs(Path(folder)),
            progress=announce,
        )
        allowed = _split(precisions) or RunConfig.model_fields["precisions"].default
        entries = _planned(compiler, chosen, work, allowed, announce)
        if measure:
            entries = _measured(compiler, entries, work, Path(folder), announce)
    title = f"{model.name}, batch {batch_size} x {length} tokens, LoRA"
    if picture is not None:
        write_png(picture, title, entries)
    if html is not None:
        html.write_text(page(title, entries), encoding="utf-8")
    if output is Format.JSON:
        print_json(_report(model.name, task, entries, work))
    else:
        _print(title, entries)


def _planned(
    compiler: Compiler,
    chosen: Sequence[DeviceClass],
    work: Work,
    precisions: Sequence[str],
    announce: Announce,
) -> list[ClassPlan | Misfit]:
    from lorikit.server.planner import Planner

    planner = Planner(
        compiler,
        precisions=precisions,
        batch_size=work.batch_size,
        max_length=work.length,
        max_rank=work.rank,
    )
    entries: list[ClassPlan | Misfit] = []
    for device_class in chosen:
        announce(f"Planning for {device_class.name}")
        entries.append(plan_for(compiler, planner, device_class, work))
    return entries


def _measured(
    compiler: Compiler,
    entries: Sequence[ClassPlan | Misfit],
    work: Work,
    folder: Path,
    announce: Announce,
) -> list[ClassPlan | Misfit]:
    done: list[ClassPlan | Misfit] = []
    for entry in entries:
        if isinstance(entry, ClassPlan):
            announce(f"Rehearsing {entry.device_class.name}")
            done.append(rehearsed(compiler, entry, work, folder=folder))
        else:
            done.append(entry)
    return done


def _report(
    model: str, task: str, entries: Sequence[ClassPlan | Misfit], work: Work
) -> dict[str, object]:
    return {
        "model": model,
        "task": task,
        "batch_size": work.batch_size,
        "length": work.length,
        "baseline_bytes": BASELINE_BYTES,
        "classes": [facts(entry) for entry in entries],
    }


def _chosen(names: Sequence[str], path: Path | None) -> list[DeviceClass]:
    known = built_in_classes() | (read_classes(path) if path else {})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CommandError(
            ExitCode.NOT_FOUND,
            f"no device class {', '.join(unknown)}; known are {', '.join(known)}, and --classes "
            "reads your own from TOML",
        )
    return [known[name] for name in names or known]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _print(title: str, entries: Sequence[ClassPlan | Misfit]) -> None:
    columns = (
        "class", "budget", "fits", "precision", "rank", "layers", "again", "micro-batch",
        "predicted", "measured", "s/step",
    )  # fmt: skip
    print_table(columns, [_row(entry) for entry in entries], title=title)
    parts = {e.device_class.name: e for e in entries if isinstance(e, ClassPlan)}
    print_table(
        ("class", "app", "runtime", "mapped", "packed", "adapter", "activations", "workspace"),
        [_parts(name, entry) for name, entry in parts.items()],
        title="Predicted peak by part",
    )
    for name, entry in parts.items():
        if entry.choice.bound:
            typer.echo(f"{name}: bound by {entry.choice.bound}")
    for each in entries:
        if isinstance(each, Misfit):
            typer.echo(f"{each.device_class.name}: {each.reason} {each.remedy}")


def _row(entry: ClassPlan | Misfit) -> tuple[object, ...]:
    name, limit = entry.device_class.name, megabytes(entry.device_class.memory_limit_bytes)
    if isinstance(entry, Misfit):
        return (name, limit, "no", *["-"] * 8)
    choice, measured = entry.choice, entry.measured
    return (
        name,
        limit,
        "yes",
        choice.precision,
        entry.rank,
        f"{len(entry.trained_layers)} of {len(entry.kept_layers)}",
        len(choice.recomputed_layers),
        choice.micro_batch,
        megabytes(choice.predicted_peak_memory_bytes),
        megabytes(measured.peak_bytes) if measured else "-",
        f"{choice.seconds_per_step:.2f}",
    )


def _parts(name: str, entry: ClassPlan) -> tuple[object, ...]:
    part = entry.footprint
    sizes = (
        part.app_bytes,
        part.runtime_bytes,
        part.mapped_bytes,
        part.packed_bytes,
        part.adapter_bytes,
        part.activation_bytes,
        part.workspace_bytes,
    )
    return (name, *(megabytes(size) for size in sizes))
