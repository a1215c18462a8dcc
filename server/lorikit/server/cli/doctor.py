# SPDX-License-Identifier: Apache-2.0
"""``lorikit doctor``: what is wrong with an installation, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorikit.proto.findings import as_json, as_text, is_healthy
from lorikit.server.cli.display import Format, FormatOption
from lorikit.server.cli.exit_codes import ExitCode
from lorikit.server.config import ServerConfig, read_server_config

doctor_app = typer.Typer(help="Look at an installation and say what to do; changes nothing.")
"""The sub-commands of ``lorikit doctor``."""


@doctor_app.command()
def server(
    folder: Annotated[Path, typer.Option(help="Folder of the server.")] = Path("runs"),
    address: Annotated[str | None, typer.Option(help="HOST:PORT that it listens on.")] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, help="Settings of the server, TOML, instead.")
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Look at a server: versions, disk, database, clock, certificates, port.

    Example: lorikit doctor server --folder ./runs
    """
    from lorikit.server.doctor import examine

    changes = {} if address is None else {"address": address}
    if config is not None:
        settings = read_server_config(config, **changes)
    else:
        settings = ServerConfig.model_validate({"folder": folder, **changes})
    findings = examine(settings)
    typer.echo(as_json(findings) if output is Format.JSON else as_text(findings))
    if not is_healthy(findings):
        raise typer.Exit(ExitCode.UNHEALTHY)


@doctor_app.command()
def device() -> None:
    """Look at a device; `lorikit doctor device --help` shows its options.

    Example: lorikit doctor device --server train.example.org:50051 --store ./device
    """
    raise AssertionError("lorikit.server.cli.main runs this before Typer is loaded")
