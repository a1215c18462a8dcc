# SPDX-License-Identifier: Apache-2.0
"""The server killed in each state of a round: it goes on, to the same bits."""

from __future__ import annotations

import contextlib

import pytest
from tests.integration.outcomes import assert_counted_once, outcome
from tests.integration.processes import Server, make_devices

pytest.importorskip("torch", reason="the server compiles with torch")

pytestmark = pytest.mark.slow

STORED = (
    "run.running",
    "round.assigning",
    "round.training",
    "round.aggregating",
    "round.evaluating",
    "round.closed",
    "run.finished",
)
"""A state has just been stored, its work not begun."""

DONE = (
    "storing.running",
    "storing.training",
    "update.kept",
    "update.accepted:2",
    "storing.aggregating",
    "storing.evaluating",
    "storing.closed",
    "storing.finished",
)
"""The work of a state has been done, the next state not been stored."""


@pytest.mark.parametrize("points", [STORED, DONE], ids=["state-stored", "work-done"])
def test_server_killed_at(points, survival, undisturbed, compiled, tmp_path):
    with contextlib.ExitStack() as running:
        server = Server(tmp_path / "server", compiled=compiled)
        running.enter_context(server.start(failpoint=points[0]))
        server.create(survival)
        devices = make_devices(tmp_path, server.address)
        for device in devices:
            running.enter_context(device.start())
        for point in (*points[1:], ""):
            server.restart(failpoint=point)
        summary = server.ended(survival.name)
        codes = [device.process.wait() for device in devices]

        assert (summary.state, codes) == ("finished", [0, 0, 0]), summary
        assert_counted_once(server, survival.name, devices, survival.rounds)
        assert outcome(server, survival.name) == undisturbed
