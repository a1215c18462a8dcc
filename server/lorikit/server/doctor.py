# SPDX-License-Identifier: Apache-2.0
"""Looks at a server's installation and says what to do; changes nothing."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import shutil
import socket
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography import x509

from lorikit.proto.findings import Finding, Health
from lorikit.server.config import ServerConfig
from lorikit.server.store.tables import SCHEMA_VERSION

_PARTS = ("lorikit", "grpcio", "torch", "transformers", "peft", "onnxruntime", "SQLAlchemy")
_DAY = 86_400.0
_SOON_DAYS = 30.0
_LITTLE_BYTES = 5 << 30
_TOO_LITTLE_BYTES = 500 << 20
_BUILT = 1_735_689_600.0
"""2025-01-01: no working clock is before it."""
_CONNECT_SECONDS = 3.0


def examine(config: ServerConfig, *, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Everything that was looked at, in the order in which to mend it."""
    now = clock()
    return [
        *_versions(),
        _disk(config),
        *_database(config, now),
        *_certificates(config, now),
        _connection(config),
    ]


def _versions() -> Iterator[Finding]:
    found, missing = [], []
    for name in _PARTS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        check="versions", health=Health.OK, sentence=f"Python {python}, {', '.join(found)}"
    )
    if missing:
        yield Finding(
            check="engine",
            health=Health.PROBLEM,
            sentence=f"{', '.join(missing)} not installed, so no model can be compiled",
            remedy='pip install "lorikit[server]"',
        )
    else:
        yield Finding(check="engine", health=Health.OK, sentence="all that compiles is installed")


def _disk(config: ServerConfig) -> Finding:
    folder = config.private_folder
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    sentence = f"{free / 1e9:,.1f} GB free for {config.folder}"
    if free >= _LITTLE_BYTES:
        return Finding(check="disk", health=Health.OK, sentence=sentence)
    return Finding(
        check="disk",
        health=Health.WARNING if free >= _TOO_LITTLE_BYTES else Health.PROBLEM,
        sentence=sentence,
        remedy="free some storage, or give another --folder: every precision of a base is kept",
    )


def _database(config: ServerConfig, now: float) -> Iterator[Finding]:
    """The database, read without changing it, and the clock, by the times that it holds."""
    path = config.private_folder / "lorikit.sqlite"
    if config.database or not path.exists():
        what = "is not in the folder and was not looked at" if config.database else "is not there"
        yield Finding(check="database", health=Health.OK, sentence=f"the database {what} yet")
        yield _clock(now, 0.0)
        return
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as connection:
            (state,) = connection.execute("PRAGMA quick_check").fetchone()
            row = connection.execute(
                "SELECT value FROM meta WHERE name = 'schema_version'"
            ).fetchone()
            (newest,) = connection.execute("SELECT max(time) FROM events").fetchone()
        connection.close()
    except sqlite3.Error as error:
        state, row, newest = str(error), None, 0.0
    version = int(row[0]) if row is not None else 0
    yield _database_finding(path, str(state), version)
    yield _clock(now, newest or 0.0)


def _database_finding(path: Path, state: str, version: int) -> Finding:
    if state != "ok":
        return Finding(
            check="database",
            health=Health.PROBLEM,
            sentence=f"{path} is damaged: {state}",
            remedy="restore it from a backup; the runs' adapters in the folder are not touched",
        )
    if version > SCHEMA_VERSION:
        return Finding(
            check="database",
            health=Health.PROBLEM,
            sentence=f"its tables are of version {version}, this server reads {SCHEMA_VERSION}",
            remedy="start the newer server that wrote it: pip install --upgrade lorikit",
        )
    older = "" if version == SCHEMA_VERSION else ", brought up to date at the next start"
    return Finding(
        check="database", health=Health.OK, sentence=f"whole, tables of version {version}{older}"
    )


def _clock(now: float, newest: float) -> Finding:
    if now < max(_BUILT, newest):
        return Finding(
            check="clock",
            health=Health.PROBLEM,
            sentence=f"the clock says {_date(now)}, earlier than what it said before",
            remedy="set the clock, or let it be set from the network; certificates depend on it",
        )
    return Finding(check="clock", health=Health.OK, sentence=f"it is {_date(now)} (UTC)")


def _certificates(config: ServerConfig, now: float) -> Iterator[Finding]:
    folder = config.identity_folder
    if not config.has_authority:
        yield Finding(
            check="certificates",
            health=Health.OK if config.tls_certificate is None else Health.WARNING,
            sentence="no authority: whoever reaches the port may take part and operate runs",
            remedy=f"lorikit certs init --folder {config.folder}",
        )
        if config.tls_certificate is not None:
            yield _certificate("the server's certificate", config.tls_certificate, now, "")
        return
    for name in ("authority.key", "server.key", "package.key"):
        yield from _key(folder / name)
    yield _certificate("the authority", folder / "authority.pem", now, "lorikit certs init")
    yield _certificate(
        "the server's certificate",
        config.tls_certificate or folder / "server.pem",
        now,
        f"lorikit certs rotate --folder {config.folder}",
    )


def _key(path: Path) -> Iterator[Finding]:
    if not path.exists():
        yield Finding(
            check="certificates",
            health=Health.PROBLEM,
            sentence=f"{path} is missing",
            remedy="restore the folder from a backup",
        )
    elif stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding(
            check="certificates",
            health=Health.PROBLEM,
            sentence=f"other users of this machine can read {path}",
            remedy=f"chmod 600 {path}; if they may have read it, make a new authority",
        )


def _certificate(what: str, path: Path, now: float, remedy: str) -> Finding:
    try:
        read = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        return Finding(
            check="certificates",
            health=Health.PROBLEM,
            sentence=f"{what} cannot be read: {error}",
            remedy=remedy or "give another --tls-certificate",
        )
    end = read.not_valid_after_utc.timestamp()
    if read.not_valid_before_utc.timestamp() <= now < end - _SOON_DAYS * _DAY:
        return Finding(
            check="certificates", health=Health.OK, sentence=f"{what} is good until {_date(end)}"
        )
    return Finding(
        check="certificates",
        health=Health.WARNING if now < end else Health.PROBLEM,
        sentence=f"{what} {'ends' if now < end else 'ended'} on {_date(end)}",
        remedy=remedy or "give another --tls-certificate",
    )


def _connection(config: ServerConfig) -> Finding:
    host, _, port = config.address.rpartition(":")
    if not port.isdecimal() or port == "0":
        sentence = f"{config.address} leaves the port open; nothing was looked at"
        return Finding(check="connection", health=Health.OK, sentence=sentence)
    try:
        with socket.create_connection((_near(host), int(port)), _CONNECT_SECONDS):
            sentence = f"a program listens on {config.address}"
            return Finding(check="connection", health=Health.OK, sentence=sentence)
    except OSError:
        return Finding(
            check="connection",
            health=Health.WARNING,
            sentence=f"nothing listens on {config.address}",
            remedy=f"lorikit server --folder {config.folder} --address {config.address}",
        )


def _near(host: str) -> str:
    """Where a server that listens on a host is reached from its own machine."""
    bare = host.strip("[]")
    try:
        return "localhost" if ipaddress.ip_address(bare).is_unspecified else bare
    except ValueError:
        return bare or "localhost"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
