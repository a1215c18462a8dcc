# SPDX-License-Identifier: Apache-2.0
"""Both doctors, on installations that are well and on ones that are broken on purpose."""

from __future__ import annotations

import json
import sqlite3
import time

import pytest
from tests.server.secured import SecuredServer

from lorikit.proto.findings import Health, is_healthy
from lorikit.sdk import doctor as device_doctor
from lorikit.sdk._store import Identity, Store
from lorikit.server.cli.app import run
from lorikit.server.config import ServerConfig
from lorikit.server.doctor import examine
from lorikit.server.identity.authority import Authority
from lorikit.server.identity.subjects import device_subject
from lorikit.server.store.sql import SqlStore

YEAR = 365 * 86_400.0


@pytest.fixture
def config(tmp_path):
    config = ServerConfig(folder=tmp_path / "runs", address="localhost:0")
    config.private_folder.mkdir(parents=True)
    SqlStore(config.database_url).close()
    Authority.create(config.identity_folder, hosts=["localhost"])
    return config


def complaints(findings):
    return {f.check: (f.health, f.sentence, f.remedy) for f in findings if f.remedy}


def test_server_that_is_well(config):
    findings = examine(config)

    checks = {finding.check for finding in findings}
    assert {"versions", "engine", "disk", "database", "clock", "certificates"} <= checks
    assert is_healthy(findings)


@pytest.mark.parametrize(
    ("years", "health", "word"),
    [(1.03, Health.WARNING, "ends on"), (1.5, Health.PROBLEM, "ended on")],
)
def test_certificate_of_the_server_at_its_end(config, years, health, word):
    found = complaints(examine(config, clock=lambda: time.time() + years * YEAR))

    assert found["certificates"][0] is health
    assert word in found["certificates"][1]
    assert "lorikit certs rotate" in found["certificates"][2]


def test_key_that_others_can_read(config):
    (config.identity_folder / "authority.key").chmod(0o644)

    health, sentence, remedy = complaints(examine(config))["certificates"]
    assert (health, "other users" in sentence) == (Health.PROBLEM, True)
    assert "chmod 600" in remedy


def test_key_that_is_missing(config):
    (config.identity_folder / "package.key").unlink()

    assert "package.key is missing" in complaints(examine(config))["certificates"][1]


def test_clock_before_anything_happened(config):
    assert complaints(examine(config, clock=lambda: 0.0))["clock"][0] is Health.PROBLEM


def test_database_that_is_damaged(config):
    path = config.private_folder / "lorikit.sqlite"
    path.write_bytes(b"no database at all" * 100)

    health, _, remedy = complaints(examine(config))["database"]
    assert health is Health.PROBLEM
    assert "backup" in remedy


def test_database_of_a_newer_server(config):
    connection = sqlite3.connect(config.private_folder / "lorikit.sqlite")
    with connection:
        connection.execute("UPDATE meta SET value = '99'")
    connection.close()

    assert "version 99" in complaints(examine(config))["database"][1]


def test_command_prints_json_and_its_exit_code_tells(config, capsys):
    (config.identity_folder / "server.key").chmod(0o666)

    assert run(["doctor", "server", "--folder", str(config.folder), "--format", "json"]) == 12
    told = json.loads(capsys.readouterr().out)
    assert not told["healthy"]
    assert {"check", "health", "sentence", "remedy"} == set(told["findings"][0])


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    with SecuredServer(tmp_path_factory.mktemp("secured") / "runs") as secured:
        yield secured


class TestDevice:
    @pytest.fixture
    def look(self, secured, tmp_path):
        def look(store=tmp_path / "device", **changes):
            options = {
                "root_certificates": secured.roots,
                "enrol_server": secured.server.enrol_address,
                **changes,
            }
            return device_doctor.examine(secured.server.address, store, **options)

        return look

    def enrolled(self, secured, folder, name):
        """A store of a device with a certificate."""
        device_id, badge = secured.badge(name, token=secured.token())
        with Store(folder) as store:
            store.save_identity(
                Identity(
                    installation_id=name,
                    device_id=device_id,
                    key=badge.key.decode(),
                    certificate=badge.certificate.decode(),
                )
            )
        return device_id

    def test_device_that_is_well(self, secured, look, tmp_path):
        self.enrolled(secured, tmp_path / "device", "installation-well")
        findings = look()

        assert complaints(findings) == {}
        assert [f.sentence for f in findings if f.check == "connection"] == [
            f"{secured.server.address} answers, and knows this device"
        ]

    def test_device_without_a_token_is_told_to_ask_for_one(self, look):
        health, _, remedy = complaints(look())["connection"]

        assert (health, "ask the operator for a token" in remedy) == (Health.WARNING, True)

    def test_device_that_was_cut_off(self, secured, look, tmp_path):
        device_id = self.enrolled(secured, tmp_path / "device", "installation-lost")
        secured.registry.revoke(device_subject(device_id), reason="lost")

        health, _, remedy = complaints(look())["connection"]
        assert (health, "cut this device off" in remedy) == (Health.PROBLEM, True)

    def test_server_of_another_authority(self, look, tmp_path):
        other = Authority.create(tmp_path / "other", hosts=["localhost"])

        health, _, remedy = complaints(look(root_certificates=other.root_pem))["connection"]
        assert (health, "authority.pem" in remedy) == (Health.PROBLEM, True)

    def test_clock_that_is_wrong_and_certificate_that_ended(
        self, secured, look, tmp_path, monkeypatch
    ):
        self.enrolled(secured, tmp_path / "device", "installation-clock")
        now = time.time()
        monkeypatch.setattr(device_doctor.time, "time", lambda: now + YEAR)
        assert complaints(look())["certificates"][0] is Health.PROBLEM
        monkeypatch.setattr(device_doctor.time, "time", lambda: now - YEAR)
        assert complaints(look())["clock"][0] is Health.PROBLEM

    def test_store_that_others_can_read(self, secured, look, tmp_path):
        self.enrolled(secured, tmp_path / "device", "installation-open")
        (tmp_path / "device" / "identity").chmod(0o644)

        assert "chmod 600" in complaints(look())["store"][2]

    def test_store_in_use_is_left_alone(self, look, tmp_path):
        with Store(tmp_path / "device") as store:
            store.identity()
            findings = look()

        assert [f.health for f in findings if f.check == "store"] == [Health.WARNING]

    def test_engine_that_is_missing(self, look, monkeypatch):
        monkeypatch.setattr(device_doctor, "available_engines", tuple)

        assert complaints(look())["engine"][2] == 'pip install "lorikit[onnx]"'

    def test_command_prints_json(self, secured, tmp_path, capsys):
        roots = tmp_path / "authority.pem"
        roots.write_bytes(secured.roots)
        arguments = ["--server", secured.server.address, "--store", str(tmp_path / "device")]
        arguments += ["--root-certificates", str(roots), "--format", "json"]
        arguments += ["--enrol-server", secured.server.enrol_address]

        assert device_doctor.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["healthy"]
