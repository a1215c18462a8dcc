# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, to be compared with that of a run that nothing happened to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.integration.processes import Device, Server


@dataclass(frozen=True)
class Outcome:
    """What a run left behind that must not depend on what happened to it meanwhile."""

    adapters: Mapping[str, str]
    """SHA-256 of the weights of every exported adapter, by folder."""
    losses: Sequence[float]
    """Of each round, as measured by the server."""


def outcome(server: Server, run: str) -> Outcome:
    folder = server.run_folder(run)
    report = json.loads((folder / "report.json").read_text())
    return Outcome(
        adapters={
            str(path.parent.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("adapter_model.safetensors"))
        },
        losses=[entry["loss"] for entry in report["rounds"]],
    )


def assert_counted_once(server: Server, run: str, devices: Sequence[Device], rounds: int) -> None:
    """Each device has one receipt a round, and nothing is left that only work in progress needs."""
    receipts = Counter(
        (e["round"], e["class"]) for e in server.events(run) if e["event"] == "update"
    )
    assert receipts == {(n, device.name): 1 for n in range(rounds) for device in devices}
    report = json.loads((server.run_folder(run) / "report.json").read_text())
    assert report["state"] == "finished"
    for entry in report["rounds"]:
        done = [d["class"] for d in entry["devices"] if d["status"] == "done"]
        assert sorted(done) == sorted(device.name for device in devices)
        assert {d["status"] for d in entry["devices"]} <= {"done", "expired"}
    assert server.held_bytes() == 0
    for device in devices:
        assert not list((device.store / "journal").iterdir())
        assert not list((device.store / "updates").iterdir())
