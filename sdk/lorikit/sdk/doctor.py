# SPDX-License-Identifier: Apache-2.0
"""Looks at a device's installation and says what to do: ``lorikit doctor device``.

Also ``python -m lorikit.sdk.doctor``. It changes nothing, on the device or on the server.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorikit.proto.findings import Finding, Health, as_json, as_text, is_healthy
from lorikit.proto.limits import PROTOCOL_VERSION
from lorikit.sdk._errors import (
    CertificateExpiredError,
    CertificateRequiredError,
    CertificateRevokedError,
    ConnectionLostError,
    IdentityError,
    LorikitError,
    ProtocolVersionError,
    RoundClosedError,
    StoreBusyError,
)
from lorikit.sdk._keys import validity
from lorikit.sdk._store import Identity, Store
from lorikit.sdk._transport import GrpcTransport
from lorikit.sdk.engines import available_engines

UNHEALTHY = 12
"""Exit code where a problem was found; the same as of ``lorikit doctor server``."""

_PARTS = ("lorikit", "grpcio", "protobuf", "numpy")
_DAY = 86_400.0
_LITTLE_BYTES = 500 << 20
_TOO_LITTLE_BYTES = 50 << 20
_BUILT = 1_735_689_600.0
"""2025-01-01: no working clock is before it."""


def examine(
    server: str,
    store: Path,
    *,
    insecure: bool = False,
    root_certificates: bytes | None = None,
    enrol_server: str | None = None,
) -> list[Finding]:
    """Everything that was looked at, in the order in which to mend it."""
    identity, findings = _identity(store)
    findings = [_versions(), _engine(), _disk(store), *findings]
    findings += _times(identity)
    transport = GrpcTransport(
        server,
        insecure=insecure,
        root_certificates=root_certificates,
        enrol_server=enrol_server,
    )
    try:
        findings.append(_connection(transport, server, identity, insecure=insecure))
    finally:
        transport.close()
    return findings


def _versions() -> Finding:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PARTS)
    python = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        check="versions",
        health=Health.OK,
        sentence=f"Python {python}, {found}, protocol {PROTOCOL_VERSION}",
    )


def _engine() -> Finding:
    engines = available_engines()
    if engines:
        found = ", ".join(f"{engine.name} {engine.version}" for engine in engines)
        return Finding(check="engine", health=Health.OK, sentence=found)
    return Finding(
        check="engine",
        health=Health.PROBLEM,
        sentence="no engine is installed, so nothing can be trained",
        remedy='pip install "lorikit[onnx]"',
    )


def _disk(store: Path) -> Finding:
    folder = next(p for p in (store.absolute(), *store.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    sentence = f"{free / 1e6:,.0f} MB free for {store}"
    if free >= _LITTLE_BYTES:
        return Finding(check="disk", health=Health.OK, sentence=sentence)
    return Finding(
        check="disk",
        health=Health.WARNING if free >= _TOO_LITTLE_BYTES else Health.PROBLEM,
        sentence=sentence,
        remedy="free some storage: a package takes from 25 MB (MiniLM) to several GB",
    )


def _identity(folder: Path) -> tuple[Identity | None, list[Finding]]:
    """Who the device is; None where it has no store yet, or another process uses it."""
    if not (folder / "identity").exists():
        sentence = f"{folder} holds no identity: the device has not enrolled yet"
        return None, [Finding(check="store", health=Health.OK, sentence=sentence)]
    try:
        with Store(folder) as store:
            identity = store.identity()
    except StoreBusyError:
        sentence = f"{folder} is in use by a running device; its identity was not looked at"
        return None, [Finding(check="store", health=Health.WARNING, sentence=sentence)]
    found = Finding(
        check="store", health=Health.OK, sentence=f"device {identity.device_id or 'without id'}"
    )
    if stat.S_IMODE((folder / "identity").stat().st_mode) & 0o077:
        found = Finding(
            check="store",
            health=Health.PROBLEM,
            sentence=f"other users of this machine can read {folder / 'identity'}",
            remedy=f"chmod 600 {folder / 'identity'}; if they may have read it, ask the operator "
            "to revoke this device and enrol it anew",
        )
    return identity, [found]


def _times(identity: Identity | None) -> Iterator[Finding]:
    """The clock, and the certificate's time by it."""
    now = time.time()
    begin, end = 0.0, 0.0
    if identity is not None and identity.certificate:
        try:
            begin, end = validity(identity.certificate.encode())
        except IdentityError as error:
            yield Finding(
                check="certificates",
                health=Health.PROBLEM,
                sentence="the device has a certificate, and nothing to use it with",
                remedy=str(error),
            )
            return
    if now < max(_BUILT, begin):
        yield Finding(
            check="clock",
            health=Health.PROBLEM,
            sentence=f"the clock says {_date(now)}, which cannot be",
            remedy="set the clock, or let it be set from the network",
        )
    else:
        yield Finding(check="clock", health=Health.OK, sentence=f"it is {_date(now)} (UTC)")
    if not end:
        return
    if now > end:
        yield Finding(
            check="certificates",
            health=Health.PROBLEM,
            sentence=f"the certificate ended on {_date(end)}",
            remedy="if the date is right, ask the operator for a new token and start the device "
            "with --enrolment-token",
        )
        return
    soon = end - now < 7 * _DAY
    yield Finding(
        check="certificates",
        health=Health.WARNING if soon else Health.OK,
        sentence=f"the certificate is good until {_date(end)}",
        remedy="let the device connect before then: it renews the certificate by itself"
        if soon
        else "",
    )


def _connection(
    transport: GrpcTransport, server: str, identity: Identity | None, *, insecure: bool
) -> Finding:
    """One harmless call: a sign of life of a task that does not exist."""
    try:
        if identity is not None and identity.device_id:
            transport.identify(
                identity.device_id,
                identity.token,
                key=identity.key.encode() if identity.certificate else b"",
                certificate=identity.certificate.encode(),
            )
        elif not insecure:
            transport.check_certificate()
        transport.heartbeat("none", "doctor", 0, 0)
    except RoundClosedError:
        sentence = f"{server} answers, and knows this device"
        return Finding(check="connection", health=Health.OK, sentence=sentence)
    except LorikitError as error:
        return _refusal(error, server, has_identity=identity is not None)
    raise AssertionError("the server knows a task without a name")


def _refusal(error: LorikitError, server: str, *, has_identity: bool) -> Finding:
    health, remedy = Health.PROBLEM, ""
    match error:
        case CertificateRequiredError() if not has_identity:
            health = Health.WARNING
            remedy = "ask the operator for a token: start the device with --enrolment-token"
        case CertificateRevokedError():
            remedy = "the operator has cut this device off; ask why, and for a new token"
        case CertificateExpiredError():
            remedy = "check the clock here; if it is right, ask the operator for a new token"
        case IdentityError() if not has_identity:
            health = Health.WARNING
            remedy = "start the device: it enrols by itself"
        case IdentityError():
            remedy = "ask the operator whether this device is known, and for a new token"
        case ProtocolVersionError():
            remedy = "update the older side: pip install --upgrade lorikit"
        case ConnectionLostError():
            remedy = (
                "check that the server runs, the address and port, firewalls, and that "
                "--root-certificates is the server's authority.pem"
            )
    return Finding(check="connection", health=health, sentence=f"{server}: {error}", remedy=remedy)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; the exit code says whether there is a problem."""
    options = _parser().parse_args(arguments)
    roots = options.root_certificates
    findings = examine(
        options.server,
        options.store,
        insecure=options.insecure,
        root_certificates=None if roots is None else roots.read_bytes(),
        enrol_server=options.enrol_server,
    )
    print(as_json(findings) if options.format == "json" else as_text(findings))
    return 0 if is_healthy(findings) else UNHEALTHY


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorikit doctor device",
        description="Look at this device's installation and say what to do; changes nothing.",
        epilog="Example: lorikit doctor device --server train.example.org:50051 --store ./device",
    )
    add = parser.add_argument
    add("--server", required=True, metavar="HOST:PORT")
    add("--store", required=True, type=Path, help="folder for the device's state")
    add("--insecure", action="store_true", help="no encryption; for tests and loopback")
    add("--root-certificates", type=Path, help="PEM of the authorities to trust")
    add(
        "--enrol-server", metavar="HOST:PORT", help="where devices enrol; the next port if left out"
    )
    add("--format", choices=("text", "json"), default="text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
