# SPDX-License-Identifier: Apache-2.0
"""``lorikit run``: what an operator asks of a server."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from lorikit.server.cli.connection import (
    AddressOption,
    CertificateOption,
    InsecureOption,
    KeyOption,
    RootsOption,
    endpoint,
)
from lorikit.server.cli.display import Format, FormatOption, print_json, print_table, progress
from lorikit.server.cli.operator_client import OperatorClient, RunSummary
from lorikit.server.cli.watch import watch_run
from lorikit.server.config import read_run_config

run_app = typer.Typer(help="Create, watch and stop runs, and fetch their adapters.")
"""The sub-commands of ``lorikit run``."""

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name or id of the run.")]

_ADDRESS = "localhost:50051"


@run_app.command()
def create(
    config: Annotated[Path, typer.Argument(help="Settings of the run, TOML.")],
    address: AddressOption = _ADDRESS,
    insecure: InsecureOption = False,
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show the run.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Start a run from a TOML file; asking again with the same file changes nothing.

    Paths in the file start at the file's folder and are the server's to read.

    Example: lorikit run create intents.toml --insecure --watch
    """
    settings = read_run_config(config)
    with (
        _client(address, insecure, roots, certificate, key) as client,
        progress(f"Asking {address}") as announce,
    ):
        announce("The server checks the settings and compiles the first package")
        summary = client.create(settings.name, settings.canonical())
    _print_summaries([summary], output)
    if watch:
        with _client(address, insecure, roots, certificate, key) as client:
            watch_run(client, summary.run_id, output)


@run_app.command("list")
def list_runs(
    address: AddressOption = _ADDRESS,
    insecure: InsecureOption = False,
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show the runs of a server.

    Example: lorikit run list --insecure --format json
    """
    with _client(address, insecure, roots, certificate, key) as client:
        _print_summaries(list(client.list()), output)


@run_app.command()
def watch(
    run: RunArgument,
    address: AddressOption = _ADDRESS,
    insecure: InsecureOption = False,
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show a run while it happens; ends with the run, and fails if the run did.

    Example: lorikit run watch intents --insecure
    """
    with _client(address, insecure, roots, certificate, key) as client:
        watch_run(client, run, output)


@run_app.command()
def stop(
    run: RunArgument,
    address: AddressOption = _ADDRESS,
    insecure: InsecureOption = False,
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="Do not wait for the round in progress.")
    ] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """End a run after the round in progress.

    Example: lorikit run stop intents --insecure --at-once
    """
    with _client(address, insecure, roots, certificate, key) as client:
        _print_summaries([client.stop(run, at_once=at_once)], output)


@run_app.command()
def show(
    run: RunArgument,
    address: AddressOption = _ADDRESS,
    insecure: InsecureOption = False,
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show the rounds of a run; as JSON this is its report.json so far.

    Example: lorikit run show intents --insecure --format json
    """
    with _client(address, insecure, roots, certificate, key) as client:
        summary, report = client.get(run)
    if output is Format.JSON:
        print_json(report)
        return
    _print_summaries([summary], output)
    print_table(
        ("round", "accuracy", "loss", "seconds", "devices", "bytes up", "bytes down"),
        [_round_row(entry) for entry in report.get("rounds", [])],
    )


@run_app.command()
def adapters(
    run: RunArgument,
    address: AddressOption = _ADDRESS,
    insecure: InsecureOption = False,
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """List the adapter folders a run has written.

    Example: lorikit run adapters intents --insecure
    """
    with _client(address, insecure, roots, certificate, key) as client:
        names = client.adapters(run)
    if output is Format.JSON:
        print_json({"run": run, "adapters": list(names)})
    else:
        print_table(("adapter",), [(name,) for name in names])


@run_app.command()
def fetch(
    run: RunArgument,
    name: Annotated[str, typer.Argument(help="Adapter, as `lorikit run adapters` lists it.")],
    folder: Annotated[Path, typer.Option("--to", help="Folder to write the files to.")],
    address: AddressOption = _ADDRESS,
    insecure: InsecureOption = False,
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Bring an adapter here: a folder that peft.PeftModel.from_pretrained loads.

    Example: lorikit run fetch intents final/rank-8 --to ./adapter --insecure
    """
    with (
        _client(address, insecure, roots, certificate, key) as client,
        progress(f"Fetching {name}"),
    ):
        files = client.fetch(run, name, folder)
    facts = [{"file": str(path), "bytes": path.stat().st_size} for path in files]
    if output is Format.JSON:
        print_json({"run": run, "adapter": name, "files": facts})
    else:
        print_table(("file", "bytes"), [(fact["file"], fact["bytes"]) for fact in facts])


def _client(
    address: str, insecure: bool, roots: Path | None, certificate: Path | None, key: Path | None
) -> OperatorClient:
    return OperatorClient(endpoint(address, insecure, roots, certificate, key))


def _print_summaries(runs: list[RunSummary], output: Format) -> None:
    if output is Format.JSON:
        print_json({"runs": [dataclasses.asdict(run) for run in runs]})
        return
    rows = [
        (
            run.name,
            run.method,
            run.state,
            f"{run.round}/{run.rounds}",
            "-" if run.metric is None else f"{run.metric:.3f}",
            run.message,
        )
        for run in runs
    ]
    print_table(("run", "method", "state", "round", "accuracy", "message"), rows)


def _round_row(entry: dict[str, Any]) -> tuple[object, ...]:
    metric, loss = entry.get("metric"), entry.get("loss")
    return (
        entry["round"],
        "-" if metric is None else f"{metric:.3f}",
        "-" if loss is None else f"{loss:.3f}",
        f"{entry['seconds']:.1f}",
        len(entry["devices"]),
        f"{entry['bytes_up']:,}",
        f"{entry['bytes_down']:,}",
    )
