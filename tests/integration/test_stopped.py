# SPDX-License-Identifier: Apache-2.0
"""Runs, servers and devices that somebody stops: everything ends in good order."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
from tests.integration.outcomes import assert_counted_once, outcome
from tests.integration.processes import PATIENCE_SECONDS, ROOT, Server, make_devices

from lorikit.sdk.__main__ import ExitCode as DeviceCode
from lorikit.server.cli.exit_codes import ExitCode

pytest.importorskip("torch", reason="the packages are compiled with torch")

pytestmark = pytest.mark.slow


@pytest.fixture
def running():
    with contextlib.ExitStack() as running:
        yield running


def lorikit_run(server: Server, *arguments: str) -> tuple[int, list[dict]]:
    """Exit code of ``lorikit run ... --format json`` and what it printed, a value a line."""
    command = [sys.executable, "-m", "lorikit.server.cli", "run", *arguments]
    done = subprocess.run(
        [*command, "--address", server.address, "--insecure", "--format", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    text = done.stdout.strip()
    lines = text.splitlines() if arguments[0] == "watch" else [text]
    return done.returncode, [json.loads(line) for line in lines]


def test_run_stopped_at_once_lets_its_devices_go(survival, compiled, running, tmp_path):
    config = survival.model_copy(update={"local_steps": 100_000})
    server = running.enter_context(
        Server(tmp_path / "server", settings={"lease_seconds": 3.0}, compiled=compiled).start()
    )
    server.create(config)
    devices = make_devices(tmp_path, server.address)
    for device in devices:
        running.enter_context(device.start())
    for device in devices:
        device.process.wait_for("Progress", step=3)

    code, (listed,) = lorikit_run(server, "list")
    assert (code, [run["state"] for run in listed["runs"]]) == (0, ["running"])
    code, (stopped,) = lorikit_run(server, "stop", "survival", "--at-once")
    assert (code, [run["name"] for run in stopped["runs"]]) == (0, ["survival"])
    codes = [device.process.wait() for device in devices]
    code, events = lorikit_run(server, "watch", "survival")
    assert (code, events[-1]["kind"], events[-1]["facts"]["state"]) == (
        ExitCode.RUN_FAILED, "state", "stopped",
    )  # fmt: skip
    code, (report,) = lorikit_run(server, "show", "survival")

    assert codes == [0, 0, 0]
    assert code == 0
    assert report["state"] == "stopped"
    assert report["message"] == "stopped by the operator after 0 rounds"
    assert [entry["state"] for entry in report["rounds"]] == ["abandoned"]
    assert {device["status"] for device in report["rounds"][0]["devices"]} == {"expired"}
    assert report["working"] == []
    for device in devices:
        assert device.process.seen("Failed")[0]["error"] == "RoundClosedError"
        assert not list((device.store / "journal").iterdir())


def test_run_stopped_after_its_round_hands_out_the_adapter(survival, compiled, running, tmp_path):
    server = running.enter_context(Server(tmp_path / "server", compiled=compiled).start())
    server.create(survival)
    devices = make_devices(tmp_path, server.address)
    for device in devices:
        running.enter_context(device.start())
    devices[0].process.wait_for("Progress")
    assert lorikit_run(server, "stop", "survival")[0] == 0

    summary = server.ended("survival")
    assert (summary.state, summary.round) == ("stopped", 1)
    for device in devices:
        assert device.process.wait() == 0
        assert device.process.seen("AdapterReady")
    assert (server.run_folder("survival") / "adapter" / "rank-768").is_dir()


def test_server_and_device_that_are_told_to_end_go_on_later(
    survival, undisturbed, compiled, running, tmp_path
):
    server = Server(tmp_path / "server", compiled=compiled)
    running.enter_context(server.start())
    server.create(survival)
    devices = make_devices(tmp_path, server.address)
    for device in devices:
        running.enter_context(device.start())
    first = devices[0].process
    first.wait_for("Progress", step=lambda step: step >= 3)
    first.terminate()
    server.process.terminate()
    assert first.wait() == DeviceCode.STOPPED
    assert server.process.wait() == 0
    assert first.seen("StateChanged")[-1]["state"] == "stopped"
    devices[0].start()
    server.start()

    assert server.ended(survival.name).state == "finished"
    assert [device.process.wait() for device in devices] == [0, 0, 0]
    steps = [line["step"] for line in first.seen("Progress")]
    again = devices[0].process.wait_for("Progress")
    assert again["step"] == steps[-1] + 1
    assert_counted_once(server, survival.name, devices, survival.rounds)
    assert outcome(server, survival.name) == undisturbed
