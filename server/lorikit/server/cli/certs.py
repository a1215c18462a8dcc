# SPDX-License-Identifier: Apache-2.0
"""``lorikit certs``: who may come in."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorikit.server.cli.connection import (
    CertificateOption,
    KeyOption,
    RootsOption,
    endpoint,
)
from lorikit.server.cli.display import Format, FormatOption, print_json, print_table
from lorikit.server.cli.operator_client import OperatorClient
from lorikit.server.config import ServerConfig, read_server_config

if TYPE_CHECKING:
    from lorikit.server.identity.enrolment import Registry
    from lorikit.server.store.sql import SqlStore

certs_app = typer.Typer(help="Make an authority, let devices and operators in, cut them off.")
"""The sub-commands of ``lorikit certs``."""

FolderOption = Annotated[Path, typer.Option(help="Folder of the server.")]
ConfigOption = Annotated[
    Path | None, typer.Option(exists=True, help="Settings of the server, TOML, instead.")
]
RemoteOption = Annotated[
    str, typer.Option("--address", help="Server, HOST:PORT, to ask instead; takes an admin.")
]
HostsOption = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address that clients connect to; may be repeated."),
]

_FOLDER = Path("runs")


class OperatorRole(StrEnum):
    """What an operator's certificate allows."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


@certs_app.command()
def init(
    folder: FolderOption = _FOLDER,
    config: ConfigOption = None,
    host: HostsOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Make an authority in the server's folder; from then on callers need certificates.

    Example: lorikit certs init --folder ./runs --host train.example.org
    """
    from lorikit.server.identity.authority import Authority

    settings = _settings(folder, config)
    hosts = host or _own_hosts()
    with _store(settings) as store:
        authority = Authority.create(settings.identity_folder, hosts=hosts)
        _note(store, "init", ", ".join(hosts))
    root = authority.folder / "authority.pem"
    if output is Format.JSON:
        print_json({"root_certificates": str(root), "hosts": hosts})
        return
    typer.echo(f"Authority made for {', '.join(hosts)}. Give {root} to every device and operator.")
    typer.echo("Next: lorikit certs operator NAME --role admin --out FOLDER, lorikit certs token")


@certs_app.command()
def rotate(
    folder: FolderOption = _FOLDER,
    config: ConfigOption = None,
    host: HostsOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Give the server a fresh key and certificate; a running server shows them at once.

    Example: lorikit certs rotate --folder ./runs --host train.example.org
    """
    settings = _settings(folder, config)
    with _registry(settings) as (registry, store):
        hosts = host or registry.authority.server_hosts()
        certificate = registry.authority.issue_server(hosts)
        _note(store, "rotate", ", ".join(hosts))
    end = certificate.not_valid_after_utc
    if output is Format.JSON:
        print_json({"hosts": hosts, "not_after": end.timestamp()})
    else:
        typer.echo(f"Server certificate for {', '.join(hosts)}, good until {end:%Y-%m-%d}.")


@certs_app.command()
def token(
    folder: FolderOption = _FOLDER,
    config: ConfigOption = None,
    hours: Annotated[float, typer.Option(min=0.01, help="How long it can be used.")] = 24.0,
    address: RemoteOption = "",
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Make a one-time token that lets one device in; it is shown this once and kept nowhere.

    Works in the server's folder, or from afar with --address and an admin's certificate.

    Example: lorikit certs token --folder ./runs --hours 2
    """
    seconds = hours * 3600
    if address:
        with OperatorClient(endpoint(address, False, roots, certificate, key)) as client:
            secret = client.issue_token(seconds)
    else:
        with _registry(_settings(folder, config)) as (registry, store):
            secret = registry.issue_token(valid_seconds=seconds, now=time.time())
            _note(store, "issue-token", "")
    if output is Format.JSON:
        print_json({"token": secret, "valid_seconds": seconds})
    else:
        typer.echo(secret)


@certs_app.command()
def operator(
    name: Annotated[str, typer.Argument(help="Name of the operator.")],
    out: Annotated[Path, typer.Option(help="Folder for the key and the certificate.")],
    role: Annotated[OperatorRole, typer.Option(help="What it allows.")] = OperatorRole.OPERATOR,
    folder: FolderOption = _FOLDER,
    config: ConfigOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Make a key and a certificate for an operator; a second one ends the first when it is used.

    Example: lorikit certs operator ann --role viewer --out ./ann
    """
    from lorikit.server.identity.authority import new_key, write_secret
    from lorikit.server.identity.subjects import Role, operator_subject

    with _registry(_settings(folder, config)) as (registry, store):
        public, private = new_key()
        subject = operator_subject(name)
        certificate = registry.issue_operator(subject, public, role=Role(role))
        out.mkdir(parents=True, exist_ok=True)
        write_secret(out / f"{name}.key", private)
        (out / f"{name}.pem").write_bytes(certificate)
        (out / "authority.pem").write_bytes(registry.authority.root_pem)
        _note(store, f"issue-{role}", subject)
    files = {"certificate": str(out / f"{name}.pem"), "key": str(out / f"{name}.key")}
    if output is Format.JSON:
        print_json({"subject": subject, "role": role.value, **files})
    else:
        typer.echo(f"{subject} may act as {role.value} with {files['certificate']}")


@certs_app.command("list")
def list_certificates(
    folder: FolderOption = _FOLDER, config: ConfigOption = None, output: FormatOption = Format.TEXT
) -> None:
    """Show who has a certificate.

    Example: lorikit certs list --folder ./runs --format json
    """
    with _registry(_settings(folder, config)) as (_, store):
        rows = store.certificates()
    now = time.time()
    facts = [
        {
            "subject": row.subject,
            "role": row.role,
            "state": f"revoked: {row.reason}"
            if row.revoked is not None
            else "expired"
            if row.not_after < now
            else "good",
            "used": row.used is not None,
            "not_after": row.not_after,
            "serial": row.serial,
        }
        for row in rows
    ]
    if output is Format.JSON:
        print_json({"certificates": facts})
        return
    print_table(
        ("subject", "role", "state", "until", "serial"),
        [
            (f["subject"], f["role"], f["state"], _day(float(row.not_after)), f["serial"])
            for f, row in zip(facts, rows, strict=True)
        ],
    )


@certs_app.command()
def revoke(
    subject: Annotated[str, typer.Argument(help="device:ID or operator:NAME, as `list` has it.")],
    reason: Annotated[str, typer.Option(help="Why; stands in the audit log.")] = "revoked",
    folder: FolderOption = _FOLDER,
    config: ConfigOption = None,
    address: RemoteOption = "",
    roots: RootsOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Cut a device or an operator off: its next call is refused, whatever it has open.

    Example: lorikit certs revoke device:4be1... --reason "phone lost"
    """
    if address:
        with OperatorClient(endpoint(address, False, roots, certificate, key)) as client:
            count = client.revoke(subject, reason)
    else:
        with _registry(_settings(folder, config)) as (registry, store):
            count = registry.revoke(subject, reason=reason)
            _note(store, "revoke", subject)
    if output is Format.JSON:
        print_json({"subject": subject, "revoked": count})
    else:
        typer.echo(f"{subject}: {count} certificates revoked")


def _settings(folder: Path, config: Path | None) -> ServerConfig:
    return ServerConfig(folder=folder) if config is None else read_server_config(config)


@contextlib.contextmanager
def _store(settings: ServerConfig) -> Iterator[SqlStore]:
    from lorikit.server.store.sql import SqlStore

    settings.private_folder.mkdir(parents=True, exist_ok=True)
    store = SqlStore(settings.database_url)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _registry(settings: ServerConfig) -> Iterator[tuple[Registry, SqlStore]]:
    """The authority of the server's folder and its store; a server may run meanwhile."""
    from lorikit.server.identity.authority import Authority
    from lorikit.server.identity.enrolment import Registry

    authority = Authority(settings.identity_folder)
    with _store(settings) as store:
        yield Registry(authority, store, certificate_days=settings.certificate_days), store


def _note(store: SqlStore, action: str, subject: str) -> None:
    from lorikit.server.store.identity import AuditLine

    store.append_audit([AuditLine(actor="local", action=action, subject=subject)])


def _own_hosts() -> list[str]:
    return [*sorted({"localhost", socket.gethostname()}), "127.0.0.1", "::1"]


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
