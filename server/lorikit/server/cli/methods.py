# SPDX-License-Identifier: Apache-2.0
"""``lorikit methods``: what there is to choose from, and what it costs for a model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorikit.proto.manifest import Task
from lorikit.server.cli.display import (
    Format,
    FormatOption,
    print_json,
    print_table,
    progress,
)
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.methods import FACTS
from lorikit.server.methods.base_delta import DELTA_ROLES
from lorikit.server.methods.costs import ModelCost, model_costs
from lorikit.server.methods.facts import LORA_AND_HEAD, MethodFacts

if TYPE_CHECKING:
    from lorikit.server.methods.base import AdapterSpace


def methods(
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder; adds bytes for that model.")
    ] = None,
    labels: Annotated[int, typer.Option(min=2, help="Number of classes of the task.")] = 2,
    targets: Annotated[str, typer.Option(help="Modules that get LoRA, with commas.")] = (
        "query,value"
    ),
    rank: Annotated[int, typer.Option(min=1, help="Largest LoRA rank.")] = 8,
    output: FormatOption = Format.TEXT,
) -> None:
    """List the federated methods: what trains, what is sent, in what devices may differ, the cost.

    Example: lorikit methods --model ./all-MiniLM-L6-v2 --labels 150 --rank 8
    """
    costs: dict[str, ModelCost] = {}
    if model is not None:
        costs = model_costs(_space(model, labels=labels, targets=targets, rank=rank))
    if output is Format.JSON:
        print_json([_as_json(name, costs.get(name)) for name in FACTS])
    else:
        _print(costs, "" if model is None else f"{model.name}, largest rank {rank}")


def _space(model: Path, *, labels: int, targets: str, rank: int) -> AdapterSpace:
    """The model's adapter tensors, by loading and exporting it."""
    if not (model / "config.json").is_file():
        raise CommandError(
            ExitCode.NOT_FOUND, f"{model} is not a Hugging Face model folder (no config.json)"
        )
    with progress(f"Loading {model.name}") as announce, tempfile.TemporaryDirectory() as folder:
        # Loads torch, which takes seconds: only when there is a model to look at.
        from lorikit.server.compile import Compiler
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
        return compiler.space(rank)


def _as_json(name: str, cost: ModelCost | None) -> dict[str, object]:
    facts = FACTS[name]
    row: dict[str, object] = {
        "name": name,
        "title": facts.title,
        "trains": facts.trains,
        "sends": facts.sends,
        "devices_may_differ_in": list(facts.accepts),
        "exact": facts.exact,
        "parameters_up": facts.upload,
        "parameters_down": facts.download,
        "roles": list(facts.roles()),
        "source": facts.source,
    }
    if cost is not None:
        row["lacks_roles"] = list(cost.lacks)
        row["rounds"] = [{"bytes_up": c.up, "bytes_down": c.down} for c in cost.rounds]
    return row


def _print(costs: dict[str, ModelCost], title: str) -> None:
    columns = ("method", "a device trains", "devices may differ in", "mean exact?", "needs")
    rows = [
        (name, facts.trains, ", ".join(facts.accepts) or "nothing", facts.exact, _needs(facts))
        for name, facts in FACTS.items()
    ]
    print_table(columns, rows)
    if not costs:
        formulas = [(name, facts.upload, facts.download) for name, facts in FACTS.items()]
        print_table(
            ("method", "parameters up", "parameters down"),
            formulas,
            title="One device and round; sums over adapted modules m, h is the head",
        )
        typer.echo("Give --model for bytes. Each method has a page in docs/methods.")
        return
    print_table(
        ("method", "bytes up", "bytes down", "this package lacks"),
        [(name, *_bytes(costs[name])) for name in FACTS],
        title=f"{title}: float32 values of one device and round, at its largest",
    )


def _needs(facts: MethodFacts) -> str:
    """What packages must have beside LoRA and head; base deltas come by themselves."""
    others = (role for role in facts.roles() if role not in (*LORA_AND_HEAD, *DELTA_ROLES))
    return ", ".join([*others, *(["base deltas"] if facts.changes_base else [])])


def _bytes(cost: ModelCost) -> tuple[str, str, str]:
    """Cells with bytes up and down, round by round where rounds take turns, and what is missing."""
    lacks = ", ".join(cost.lacks)
    if not cost.rounds:
        return "-", "-", lacks
    up = dict.fromkeys(f"{c.up:,}" for c in cost.rounds)
    down = dict.fromkeys(f"{c.down:,}" for c in cost.rounds)
    return " / ".join(up), " / ".join(down), lacks
