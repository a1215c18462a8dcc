# SPDX-License-Identifier: Apache-2.0
"""``lorikit certs`` and ``lorikit audit``, in a folder of their own."""

from __future__ import annotations

import json
import ssl
import stat

import pytest
from sqlalchemy import create_engine, text
from tests.server.secured import SecuredServer

from lorikit.server.cli.app import run
from lorikit.server.cli.exit_codes import ExitCode


@pytest.fixture
def lorikit(tmp_path, capsys):
    def lorikit(*arguments: str) -> dict:
        command = [*arguments, "--folder", str(tmp_path / "runs"), "--format", "json"]
        assert run(command) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return lorikit


def test_authority_operators_and_tokens(lorikit, tmp_path):
    lorikit("certs", "init", "--host", "train.example.org")
    out = tmp_path / "ann"
    made = lorikit("certs", "operator", "ann", "--role", "viewer", "--out", str(out))
    first, second = (lorikit("certs", "token")["token"] for _ in range(2))
    listed = lorikit("certs", "list")["certificates"]
    lorikit("certs", "revoke", "operator:ann", "--reason", "left")
    gone = lorikit("certs", "list")["certificates"]

    assert first != second
    assert stat.S_IMODE((out / "ann.key").stat().st_mode) == 0o600
    assert made["role"] == "viewer"
    assert [(c["subject"], c["state"]) for c in listed] == [("operator:ann", "good")]
    assert [c["state"] for c in gone] == ["revoked: left"]
    lines = lorikit("audit", "show")["lines"]
    assert [(e["actor"], e["action"], e["subject"]) for e in lines] == [
        ("local", "init", "train.example.org"),
        ("local", "issue-viewer", "operator:ann"),
        ("local", "issue-token", ""),
        ("local", "issue-token", ""),
        ("local", "revoke", "operator:ann"),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["certs", "init"], ExitCode.CONFIG, "authority already"),
        (["certs", "operator", "a b", "--out", "x"], ExitCode.REFUSED, "is no name"),
        (["certs", "revoke", "ann"], ExitCode.REFUSED, "device:ID or operator:NAME"),
        (["audit", "verify", "--head", "x:y"], ExitCode.USAGE, "LINE:DIGEST"),
        (["audit", "verify", "--head", "9:ab"], ExitCode.RUN_FAILED, "lines were cut off"),
    ],
)
def test_error_is_one_line_with_the_remedy(lorikit, tmp_path, capsys, arguments, code, words):
    lorikit("certs", "init")

    assert run([*arguments, "--folder", str(tmp_path / "runs")]) == code
    assert words in capsys.readouterr().err


def test_folder_without_an_authority_is_named(tmp_path, capsys):
    assert run(["certs", "token", "--folder", str(tmp_path)]) == ExitCode.CONFIG
    assert "lorikit certs init" in capsys.readouterr().err
    assert run(["audit", "show", "--folder", str(tmp_path)]) == ExitCode.NOT_FOUND


def test_audit_log_that_was_changed_is_told(lorikit, tmp_path, capsys):
    lorikit("certs", "init")
    for _ in range(3):
        lorikit("certs", "token")
    head = lorikit("audit", "verify")["head"]
    lorikit("certs", "token")
    assert lorikit("audit", "verify", "--head", head)["lines"] == 5
    engine = create_engine(f"sqlite:///{tmp_path / 'runs/.server/lorikit.sqlite'}")
    with engine.begin() as connection:
        connection.execute(text("DROP TRIGGER audit_no_update"))
        connection.execute(text("UPDATE audit SET actor = 'nobody' WHERE sequence = 3"))
    engine.dispose()

    command = ["audit", "verify", "--folder", str(tmp_path / "runs")]
    assert run(command) == ExitCode.RUN_FAILED
    assert "line 3" in capsys.readouterr().err


def test_rotated_certificate_is_shown_by_a_running_server(tmp_path, capsys):
    with SecuredServer(tmp_path / "runs") as secured:
        host, _, port = secured.server.enrol_address.rpartition(":")
        before = ssl.get_server_certificate((host, int(port)), timeout=10)
        assert run(["certs", "rotate", "--folder", str(tmp_path / "runs")]) == 0
        after = ssl.get_server_certificate((host, int(port)), timeout=10)
        device, _ = secured.enrolled()
        assert device.next_task(0.0).WhichOneof("outcome") == "wait"
        device.close()

    assert before != after
    assert "localhost" in capsys.readouterr().out
