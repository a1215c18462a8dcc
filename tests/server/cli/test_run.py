# SPDX-License-Identifier: Apache-2.0
"""``lorikit run`` against a real server whose devices do arithmetic."""

from __future__ import annotations

import hashlib
import json

import pytest
from tests.server.federation import crowd, run_config, server_config, start_server

from lorikit.server.cli import operator_client
from lorikit.server.cli.app import run
from lorikit.server.cli.exit_codes import CommandError, ExitCode


@pytest.fixture
def server(tmp_path):
    server = start_server(server_config(tmp_path / "server"))
    yield server
    server.stop()


@pytest.fixture
def settings(tmp_path):
    config = run_config(tmp_path / "data", rounds=2)
    path = tmp_path / "run.json"
    path.write_text(config.canonical())
    return path


def test_run_is_created_watched_shown_and_its_adapter_fetched(server, settings, tmp_path, capsys):
    there = ["--address", server.address, "--insecure"]

    with crowd(server.address):
        assert run(["run", "create", str(settings), *there, "--watch"]) == 0
    watched = capsys.readouterr().out
    assert run(["run", "show", "test", *there, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert run(["run", "adapters", "test", *there, "--format", "json"]) == 0
    names = json.loads(capsys.readouterr().out)["adapters"]
    final = next(name for name in names if name.startswith("final/"))
    target = tmp_path / "adapter"
    assert run(["run", "fetch", "test", final, "--to", str(target), *there]) == 0

    assert "round 2 done: 3 updates, accuracy" in watched
    assert "run is finished" in watched
    assert [entry["round"] for entry in report["rounds"]] == [0, 1]
    assert {path.name for path in target.iterdir()} == {"adapter.bundle", "rank.json"}


def test_watching_as_json_gives_one_event_a_line(server, settings, capsys):
    there = ["--address", server.address, "--insecure", "--format", "json"]

    with crowd(server.address):
        run(["run", "create", str(settings), *there])
        capsys.readouterr()
        assert run(["run", "watch", "test", *there]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert {event["kind"] for event in events} >= {"state", "device", "round", "task", "update"}


def test_stopped_run_ends_the_watch_with_its_exit_code(server, settings, capsys):
    there = ["--address", server.address, "--insecure"]
    run(["run", "create", str(settings), *there])

    assert run(["run", "stop", "test", "--at-once", *there]) == 0
    assert run(["run", "watch", "test", *there]) == ExitCode.RUN_FAILED
    assert run(["run", "list", *there]) == 0

    assert "stopped" in capsys.readouterr().out


def test_refusals_keep_the_servers_words(server, settings, tmp_path, capsys):
    there = ["--address", server.address, "--insecure"]
    other = tmp_path / "other.json"
    other.write_text(run_config(tmp_path / "data", rounds=9).canonical())
    run(["run", "create", str(settings), *there])

    assert run(["run", "create", str(other), *there]) == ExitCode.REFUSED
    assert "other settings" in capsys.readouterr().err
    assert run(["run", "show", "nothing", *there]) == ExitCode.NOT_FOUND
    assert "nothing" in capsys.readouterr().err
    assert run(["run", "fetch", "test", "final/rank-9", "--to", "x", *there]) == ExitCode.NOT_FOUND


def test_no_server_is_said_with_the_address(capsys):
    assert run(["run", "list", "--address", "localhost:1", "--insecure"]) == ExitCode.UNREACHABLE

    assert "localhost:1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/passwd", "a\\b"])
def test_file_name_that_leaves_the_folder_is_refused(name):
    with pytest.raises(CommandError, match="unsafe"):
        operator_client._plain_name(name)


def test_damaged_file_is_removed_and_said(tmp_path):
    path = tmp_path / "adapter.bin"
    path.write_bytes(b"damaged")

    with pytest.raises(CommandError, match="fetch it again"):
        operator_client._check_digest(path, hashlib.sha256(b"whole").hexdigest())

    assert not path.exists()
