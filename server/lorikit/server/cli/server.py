# SPDX-License-Identifier: Apache-2.0
"""``lorikit server``: hands out work until it is stopped."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorikit.server.cli.display import Format, FormatOption, progress
from lorikit.server.config import ServerConfig, read_server_config

if TYPE_CHECKING:
    from lorikit.server.app import Coordinator


def server(
    config: Annotated[
        Path | None, typer.Option(exists=True, help="Settings of the server, TOML.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the database, the blobs and the results.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(exists=True, help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(exists=True, help="Its private key, PEM.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Say that plain text is meant; loopback only.")
    ] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Run the server; Ctrl-C or SIGTERM ends it, and a new start goes on where it was.

    Example: lorikit server --address localhost:50051 --folder ./runs
    """
    logging.getLogger("lorikit").setLevel(logging.INFO)
    given = {
        "address": address,
        "folder": folder,
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
        "insecure": insecure or None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if config is not None:
        settings = read_server_config(config, **changes)
    else:
        settings = ServerConfig.model_validate(changes)
    with progress("Starting"):
        # Loads the database and gRPC parts: only when there is something to serve.
        from lorikit.server.app import serve

    def started(coordinator: Coordinator) -> None:
        if output is Format.JSON:
            facts = {"address": coordinator.address, "enrol_address": coordinator.enrol_address}
            typer.echo(json.dumps({"event": "listening", **facts}))
        else:
            typer.echo(f"Listening on {coordinator.address}; Ctrl-C stops")
            if coordinator.enrol_address:
                typer.echo(f"Devices with a token enrol on {coordinator.enrol_address}")

    asyncio.run(serve(settings, started=started))
