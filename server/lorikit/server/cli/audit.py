# SPDX-License-Identifier: Apache-2.0
"""``lorikit audit``: who did what, and whether the log is whole."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorikit.server.cli.certs import ConfigOption, FolderOption
from lorikit.server.cli.display import Format, FormatOption, print_json, print_table
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.config import ServerConfig, read_server_config

if TYPE_CHECKING:
    from lorikit.server.store.sql import SqlStore
    from lorikit.server.store.tables import AuditRow

audit_app = typer.Typer(help="Read and verify the log of who did what on a server.")
"""The sub-commands of ``lorikit audit``."""

_FOLDER = Path("runs")


@audit_app.command()
def show(
    folder: FolderOption = _FOLDER,
    config: ConfigOption = None,
    actor: Annotated[
        str | None,
        typer.Option(help="Only lines of device:ID, operator:NAME, unknown:HOST, local."),
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="At most so many lines, the newest.")] = 100,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show the newest lines, refusals among them.

    Example: lorikit audit show --folder ./runs --last 20
    """
    with _store(folder, config) as store:
        rows = deque(store.audit(actor=actor), maxlen=last)
    if output is Format.JSON:
        print_json({"lines": [_facts(row) for row in rows]})
        return
    print_table(
        ("line", "time (UTC)", "who", "did", "to", "outcome", "detail"),
        [
            (
                row.sequence,
                datetime.fromtimestamp(row.time, UTC).strftime("%Y-%m-%d %H:%M:%S"),
                row.actor,
                row.action,
                row.subject,
                row.outcome,
                row.detail,
            )
            for row in rows
        ],
    )


@audit_app.command()
def verify(
    folder: FolderOption = _FOLDER,
    config: ConfigOption = None,
    head: Annotated[
        str | None,
        typer.Option(help="LINE:DIGEST, as an earlier verify printed it: shows lines cut off."),
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Follow the chain of digests from the first line; fails where a line was changed.

    Note the head somewhere else: with it, a later verify also sees lines that were cut off.

    Example: lorikit audit verify --folder ./runs
    """
    from lorikit.server.identity.audit import verify as verify_rows

    number, digest = _parse_head(head)
    with _store(folder, config) as store:
        seen: list[str] = []

        def noticing() -> Iterator[AuditRow]:
            for row in store.audit():
                if row.sequence == number:
                    seen.append(row.digest)
                yield row

        verdict = verify_rows(noticing())
    if verdict.broken is not None:
        raise CommandError(
            ExitCode.RUN_FAILED,
            f"line {verdict.broken} of the audit log is not what was written; lines up to "
            f"{verdict.head.lines} are whole",
        )
    if number and seen != [digest]:
        raise CommandError(
            ExitCode.RUN_FAILED,
            f"the audit log does not hold line {number} as it was then: lines were cut off or "
            "the log was replaced",
        )
    text = f"{verdict.head.lines}:{verdict.head.digest}"
    if output is Format.JSON:
        print_json({"lines": verdict.head.lines, "head": text})
    else:
        typer.echo(f"{verdict.head.lines} lines, all as they were written; head {text}")


def _parse_head(head: str | None) -> tuple[int, str]:
    number, _, digest = (head or "0:").partition(":")
    if not number.isdecimal():
        raise CommandError(ExitCode.USAGE, f"--head must be LINE:DIGEST, got {head!r}")
    return int(number), digest


@contextlib.contextmanager
def _store(folder: Path, config: Path | None) -> Iterator[SqlStore]:
    from lorikit.server.store.sql import SqlStore

    settings = ServerConfig(folder=folder) if config is None else read_server_config(config)
    if not settings.database and not settings.private_folder.is_dir():
        raise CommandError(
            ExitCode.NOT_FOUND, f"{folder} is no server's folder; give one with --folder"
        )
    store = SqlStore(settings.database_url)
    try:
        yield store
    finally:
        store.close()


def _facts(row: AuditRow) -> dict[str, Any]:
    names = ("sequence", "time", "actor", "action", "subject", "outcome", "detail", "digest")
    return {name: getattr(row, name) for name in names}
