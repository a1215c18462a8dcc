# SPDX-License-Identifier: Apache-2.0
"""A federation in which everybody shows a certificate, as processes, made with the commands."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.integration.outcomes import assert_counted_once, outcome
from tests.integration.processes import (
    PATIENCE_SECONDS,
    ROOT,
    Device,
    Server,
    free_port,
    make_devices,
    until,
)

from lorikit.sdk import CertificateRevokedError, Client
from lorikit.sdk._store import Store
from lorikit.server.identity.authority import Authority

pytest.importorskip("torch", reason="the packages are compiled with torch")

pytestmark = pytest.mark.slow


class Certified:
    """A server with an authority, and devices with tokens."""

    def __init__(self, folder: Path, compiled: Path, running: contextlib.ExitStack) -> None:
        self.folder, self.compiled, self.running = folder, compiled, running
        self.runs = folder / "server" / "runs"
        self.printed: list[str] = []
        self.tokens: list[str] = []
        self.lorikit("certs", "init", "--host", "127.0.0.1")
        self.lorikit("certs", "operator", "ann", "--role", "admin", "--out", str(folder / "ann"))
        self.roots = folder / "ann" / "authority.pem"
        self.trust = {
            "root_certificates": self.roots,
            "certificate": folder / "ann" / "ann.pem",
            "key": folder / "ann" / "ann.key",
        }
        self.enrol_address = f"127.0.0.1:{free_port()}"
        self.server = Server(
            folder / "server",
            compiled=compiled,
            trust=self.trust,
            settings={"enrol_address": f'"{self.enrol_address}"'},
        )

    def serve(self) -> Server:
        return self.running.enter_context(self.server.start())

    def lorikit(self, *arguments: str) -> dict[str, Any]:
        """What a command in the server's folder prints as JSON."""
        command = [sys.executable, "-m", "lorikit.server.cli", *arguments]
        done = subprocess.run(
            [*command, "--folder", str(self.runs), "--format", "json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        if arguments[:2] != ("certs", "token"):
            self.printed.append(done.stdout + done.stderr)
        return json.loads(done.stdout)

    def devices(self, count: int) -> Sequence[Device]:
        made = make_devices(self.folder, self.server.address, count)
        for device in made:
            token = self.lorikit("certs", "token")["token"]
            self.tokens.append(token)
            device.environment = {"LORIKIT_ENROLMENT_TOKEN": token}
            device.trust = (
                *("--root-certificates", str(self.roots)),
                *("--enrol-server", self.enrol_address),
            )
            self.running.enter_context(device.start())
        return made

    def refusals(self) -> list[tuple[str, str, str]]:
        lines = self.lorikit("audit", "show", "--last", "10000")["lines"]
        return [(e["actor"], e["action"], e["outcome"]) for e in lines if e["outcome"] != "ok"]


@pytest.fixture
def certified(compiled, tmp_path) -> Iterator[Certified]:
    with contextlib.ExitStack() as running:
        yield Certified(tmp_path, compiled, running)


def secrets_of(certified: Certified, devices: Sequence[Device]) -> dict[str, bytes]:
    """Everything that must stay where it is, by name."""
    found = {f"token {n}": token.encode() for n, token in enumerate(certified.tokens)}
    for device in devices:
        with Store(device.store) as store:
            key = store.identity().key
        found[f"key of {device.name}"] = base64.b64decode("".join(key.splitlines()[1:-1]))
        found[f"key of {device.name} in PEM"] = key.splitlines()[1].encode()
    for path in (*certified.runs.glob(".server/identity/*.key"), certified.folder / "ann/ann.key"):
        found[path.name] = path.read_bytes().splitlines()[1]
    return found


def test_run_with_certificates_ends_in_the_same_bits_and_tells_no_secret(
    certified, survival, undisturbed
):
    server = certified.serve()
    devices = certified.devices(3)
    server.create(survival)
    assert server.ended(survival.name).state == "finished"
    assert [device.process.wait() for device in devices] == [0, 0, 0]
    server.process.popen.terminate()
    assert server.process.wait() == 0

    certified.server.start()
    assert_counted_once(server, survival.name, devices, survival.rounds)
    assert outcome(server, survival.name) == undisturbed
    assert certified.lorikit("audit", "verify")["lines"] > 10
    lines = certified.lorikit("audit", "show", "--last", "10000")["lines"]
    trained = [e["actor"] for e in lines if (e["action"], e["outcome"]) == ("train", "ok")]
    assert len(trained) == len(devices) * survival.rounds
    assert len(set(trained)) == len(devices)

    kept = {device.store / "identity" for device in devices}
    kept |= {*certified.runs.glob(".server/identity/*.key"), certified.folder / "ann/ann.key"}
    texts = {str(path): path.read_bytes() for path in everything(certified.folder) - kept}
    texts["printed"] = "".join(certified.printed).encode()
    for device in devices:
        texts[f"{device.name} printed"] = json.dumps(device.process.lines).encode()
    for name, secret in secrets_of(certified, devices).items():
        assert [where for where, text in texts.items() if secret in text] == [], name
    for path in kept:
        assert path.stat().st_mode & 0o077 == 0, path


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_package_of_another_signer_is_refused_before_it_is_downloaded(certified, survival):
    server = certified.serve()
    (device,) = certified.devices(1)
    device.process.wait_for("StateChanged", state="waiting")
    server.process.kill()
    other = Authority.create(certified.folder / "other", hosts=["localhost"])
    os.replace(other.folder / "package.key", certified.runs / ".server/identity/package.key")
    certified.server.start()
    server.create(survival.model_copy(update={"min_devices": 1, "min_updates": 1}))

    failed = device.process.wait_for("Failed")
    assert failed["error"] == "PackageSignatureError"
    assert not device.process.seen("Downloaded")

    def told() -> bool:
        lines = certified.lorikit("audit", "show", "--last", "10000")["lines"]
        return any(e["subject"].endswith("error:PackageSignatureError") for e in lines)

    until(told, "the line about the refused package")


def test_device_that_is_cut_off_ends_and_says_why(certified):
    server = certified.serve()
    (device,) = certified.devices(1)
    device.process.wait_for("StateChanged", state="waiting")
    (_, mine) = certified.lorikit("certs", "list")["certificates"]
    with server.operator() as client:
        assert client.revoke(mine["subject"], "phone lost") == 1

    assert device.process.wait() == 6
    (error,) = device.process.seen("Error")
    assert (error["error"], "phone lost" in error["message"]) == ("CertificateRevokedError", True)
    refusals = certified.refusals()
    assert (mine["subject"], "NextTask", "CERTIFICATE_REVOKED") in refusals
    with (
        Client(
            server.address,
            [],
            store=device.store,
            root_certificates=certified.roots.read_bytes(),
            enrol_server=certified.enrol_address,
        ) as client,
        pytest.raises(CertificateRevokedError, match="phone lost"),
    ):
        client.run()
