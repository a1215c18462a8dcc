# SPDX-License-Identifier: Apache-2.0
"""FFA-LoRA, RoLoRA and LoRA-FAIR on real processes, with a device killed and one that joins late.

Four devices over gRPC on the ``onnx`` engine. In round 1 one of the first three is killed, so the
round stands still until it is back; the fourth comes meanwhile and works from round 2 on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from tests.integration.compiled_server import leave_parts
from tests.integration.processes import Server, make_devices

from lorikit.proto.tensors import Tensors
from lorikit.server.export import read_adapter

pytest.importorskip("torch", reason="the server compiles with torch")

pytestmark = pytest.mark.slow

ROUNDS = 4
MOVED = {
    "ffa-lora": [{"lora_B", "head"}] * (ROUNDS - 1),
    "rolora": [{"lora_A", "head"}, {"lora_B", "head"}, {"lora_A", "head"}],
    "lora-fair": [{"lora_A", "lora_B", "head"}] * (ROUNDS - 1),
}
"""Roles that differ between the adapters of a round and the next."""


@pytest.fixture(scope="module")
def settings(run_settings):
    """Settings of a run of one method."""

    def settings(method: str):
        return run_settings(
            name=method,
            method=method,
            rounds=ROUNDS,
            min_devices=3,
            min_updates=3,
            local_steps=25,
        )

    return settings


@pytest.fixture(scope="module")
def packages(compiler, settings) -> Path:
    """Folder of the packages, for servers that start at once."""
    folder = compiler.blobs.folder.parent / "one_factor"
    folder.mkdir()
    (folder / "blobs").symlink_to(compiler.blobs.folder)
    leave_parts(folder, compiler, settings("ffa-lora"))
    return folder


@pytest.mark.parametrize("method", MOVED)
def test_four_devices_one_killed_and_one_late(method, settings, packages, tmp_path):
    with contextlib.ExitStack() as running:
        server = running.enter_context(Server(tmp_path / "server", compiled=packages).start())
        server.create(settings(method))
        *first, late = devices = make_devices(tmp_path, server.address, 4)
        for device in first:
            running.enter_context(device.start())
        victim = first[0]
        victim.process.wait_for("TaskStarted", round=1)
        victim.process.kill()
        running.enter_context(late.start())
        late.process.wait_for("StateChanged", state="waiting")
        running.enter_context(victim.start())
        summary = server.ended(method)
        codes = [device.process.wait() for device in devices]
        ready = [device.process.seen("AdapterReady") for device in devices]

    assert (summary.state, summary.round, codes) == ("finished", ROUNDS, [0] * 4), summary
    assert [len(events) for events in ready] == [1] * 4
    report = json.loads((server.run_folder(method) / "report.json").read_text())
    done = [
        sorted(d["class"] for d in entry["devices"] if d["status"] == "done")
        for entry in report["rounds"]
    ]
    names = [device.name for device in devices]
    assert done[:2] == [names[:3]] * 2
    assert done[-1] == names
    assert report["rounds"][-1]["loss"] < report["rounds"][0]["loss"]
    assert moved_roles(server.run_folder(method)) == MOVED[method]


def moved_roles(run: Path) -> list[set[str]]:
    """From each round's adapter to the next, the roles of the tensors that changed."""
    rounds = [
        read_adapter(run / "adapters" / f"round-{number:04d}" / "rank-8").tensors
        for number in range(ROUNDS)
    ]
    return [_differing(*pair) for pair in itertools.pairwise(rounds)]


def _differing(before: Tensors, after: Tensors) -> set[str]:
    roles = {}
    for name, values in after.items():
        role = next((part for part in ("lora_A", "lora_B") if part in name), "head")
        roles[role] = roles.get(role, False) or not np.array_equal(values, before[name])
    return {role for role, has_changed in roles.items() if has_changed}
