# SPDX-License-Identifier: Apache-2.0
"""``lorikit profile``: which device classes can train a model, and how."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorikit.proto.manifest import Task
from lorikit.server.cli.device_classes import DeviceClass, built_in_classes, read_classes
from lorikit.server.cli.display import (
    Format,
    FormatOption,
    megabytes,
    print_json,
    print_table,
    progress,
)
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.config import RunConfig

if TYPE_CHECKING:
    from lorikit.server.compile import Compiler
    from lorikit.server.methods.base import Assignment, Participant
    from lorikit.server.planner import Planner

BASELINE_BYTES = 54_000_000
"""Resident memory assumed for a device process before it trains: interpreter, numpy and gRPC,
measured on Linux x86-64; the planner adds the runtime."""


def profile(
    model: Annotated[Path, typer.Option(help="Hugging Face model folder.")],
    names: Annotated[
        list[str] | None, typer.Option("--class", help="Only these classes; may be repeated.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(exists=True, help="Your own classes, TOML, besides ours.")
    ] = None,
    labels: Annotated[int, typer.Option(min=2, help="Number of classes of the task.")] = 2,
    targets: Annotated[str, typer.Option(help="Modules that get LoRA, with commas.")] = (
        "query,value"
    ),
    rank: Annotated[int, typer.Option(min=1, help="Largest LoRA rank.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per optimiser step.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Longest input in tokens.")] = 128,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show for each device class whether a model's training fits, with which plan and memory.

    Example: lorikit profile --model ./all-MiniLM-L6-v2 --labels 150 --class phone-3gb
    """
    chosen = _chosen(names or (), classes)
    if not (model / "config.json").is_file():
        raise CommandError(
            ExitCode.NOT_FOUND, f"{model} is not a Hugging Face model folder (no config.json)"
        )
    with progress(f"Loading {model.name}") as announce, tempfile.TemporaryDirectory() as folder:
        # Loads torch, which takes seconds: only when there is something to plan.
        from lorikit.server.compile import Compiler
        from lorikit.server.planner import Planner
        from lorikit.server.store.blobs import FolderBlobs

        compiler = Compiler(
            model,
            Task(
                kind="sequence-classification",
                labels=tuple(f"label_{index}" for index in range(labels)),
            ),
            targets=tuple(part.strip() for part in targets.split(",") if part.strip()),
            blobs=FolderBlobs(Path(folder)),
            progress=announce,
        )
        planner = Planner(
            compiler,
            precisions=RunConfig.model_fields["precisions"].default,
            batch_size=batch_size,
            max_length=length,
            max_rank=rank,
        )
        facts = []
        for device_class in chosen:
            announce(f"Planning for {device_class.name}")
            facts.append(_class_facts(compiler, planner, device_class, rank))
    report = {
        "model": model.name,
        "batch_size": batch_size,
        "length": length,
        "baseline_bytes": BASELINE_BYTES,
        "classes": facts,
    }
    if output is Format.JSON:
        print_json(report)
    else:
        _print(model.name, facts, batch_size=batch_size, length=length)


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


def _class_facts(
    compiler: Compiler, planner: Planner, device_class: DeviceClass, rank: int
) -> dict[str, object]:
    from lorikit.server.planner import DoesNotFitError

    facts: dict[str, object] = {
        "class": device_class.name,
        "memory_limit_bytes": device_class.memory_limit_bytes,
        "source": device_class.source,
    }
    profile = device_class.profile(baseline_bytes=BASELINE_BYTES)
    try:
        participant = planner.participant(device_class.name, profile, {})
        assignment = fullest_assignment(compiler, participant, rank)
        choice = planner.choose(profile, assignment)
    except DoesNotFitError as error:
        return facts | {"fits": False, "plan": None, "reason": error.reason, "remedy": error.remedy}
    return facts | {
        "fits": True,
        "plan": {
            "precision": choice.precision,
            "runtime": choice.runtime,
            "micro_batch": choice.micro_batch,
            "rank": max(assignment.ranks.values()),
            "trained_layers": list(assignment.trained_layers),
            "kept_layers": list(assignment.kept_layers),
        },
        "predicted_peak_memory_bytes": choice.predicted_peak_memory_bytes,
        "seconds_per_step": participant.seconds_per_step,
    }


def fullest_assignment(compiler: Compiler, participant: Participant, rank: int) -> Assignment:
    """The most a device can train: its greatest depth, and the largest rank at that depth."""
    from lorikit.server.methods.base import Assignment

    layers = tuple(range(compiler.layer_count))
    if participant.max_depth:
        kept, trained = layers, layers[-participant.max_depth :]
    else:
        kept = trained = layers[-participant.max_layers :]
    space = compiler.space(rank)
    return Assignment(
        device_id=participant.device_id,
        ranks={a.module: participant.max_rank for a, _ in space.pairs() if a.layer in kept},
        trained_layers=trained,
        kept_layers=kept,
    )


def _print(
    model: str, facts: Sequence[Mapping[str, object]], *, batch_size: int, length: int
) -> None:
    rows = [_row(entry) for entry in facts]
    print_table(
        ("class", "budget", "fits", "precision", "rank", "layers", "micro-batch", "peak", "s/step"),
        rows,
        title=f"{model}, batch {batch_size} x {length} tokens, LoRA",
    )
    for entry in facts:
        if not entry["fits"]:
            typer.echo(f"{entry['class']}: {entry['reason']} {entry['remedy']}")


def _row(entry: Mapping[str, object]) -> tuple[object, ...]:
    limit = megabytes(_number(entry["memory_limit_bytes"]))
    plan = entry["plan"]
    if not isinstance(plan, dict):
        return (entry["class"], limit, "no", "-", "-", "-", "-", "-", "-")
    return (
        entry["class"],
        limit,
        "yes",
        plan["precision"],
        plan["rank"],
        f"{len(plan['trained_layers'])} of {len(plan['kept_layers'])}",
        plan["micro_batch"],
        megabytes(_number(entry["predicted_peak_memory_bytes"])),
        f"{_number(entry['seconds_per_step']):.2f}",
    )


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return value
