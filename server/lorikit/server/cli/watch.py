# SPDX-License-Identifier: Apache-2.0
"""Shows a run while it happens."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.live import Live

from lorikit.server.cli.display import Format
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.cli.operator_client import OperatorClient
from lorikit.server.cli.run_view import RunView


def watch_run(client: OperatorClient, run: str, output: Format) -> None:
    """Show a run's events until it ends: a live table, plain lines, or one JSON object a line.

    Raises:
        CommandError: RUN_FAILED, if the run failed or was stopped.
    """
    summary, _ = client.get(run)
    view = RunView(rounds_planned=summary.rounds)
    console = Console()
    if output is Format.JSON:
        for event in client.watch(summary.run_id):
            view.apply(event)
            facts = {
                "sequence": event.sequence,
                "time": event.time,
                "kind": event.kind,
                "facts": event.facts,
            }
            typer.echo(json.dumps(facts))
    elif console.is_terminal:
        with Live(view.render(), console=console, refresh_per_second=4) as live:
            for event in client.watch(summary.run_id):
                view.apply(event)
                live.update(view.render())
    else:
        for event in client.watch(summary.run_id):
            line = view.apply(event)
            if line:
                typer.echo(line)
    summary, _ = client.get(run)
    if summary.state in ("failed", "stopped"):
        raise CommandError(
            ExitCode.RUN_FAILED,
            f"run {summary.name} {summary.state} in round {summary.round + 1} of "
            f"{summary.rounds}: {summary.message or 'no reason given'}",
        )
