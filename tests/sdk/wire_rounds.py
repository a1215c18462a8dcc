# SPDX-License-Identifier: Apache-2.0
"""Rounds of one device with error feedback, in a process that kills itself where it is told to.

    python -m tests.sdk.wire_rounds FOLDER ROUNDS KILL_AT

The device keeps its residuals in a real store; the server is a file, replaced whole, with the sum
of what it got and the last round that counted. ``KILL_AT`` n > 0 kills the process right before
its n-th replacement of a file, -n right after it; 0 never.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from lorikit.proto.plan import WireScheme
from lorikit.proto.tensors import Bundle, Tensors, pack, raw, unpack
from lorikit.quantization import wire
from lorikit.sdk._durable import write_durably
from lorikit.sdk._store import Store
from lorikit.sdk._wire import encode_with_feedback

START: Tensors = {"w": np.zeros((24, 32), np.float32)}


def scheme_of(number: int, counted: int | None) -> WireScheme:
    return WireScheme(
        codec="int1", error_feedback=True, stream="s", round=number, counted_round=counted
    )


def trained(adapter: Tensors, number: int) -> Tensors:
    """A round of the device's training: a step to its own optimum, with noise of the round."""
    noise = np.random.default_rng(number).standard_normal((24, 32)).astype(np.float32)
    target = np.linspace(-1, 1, 768, dtype=np.float32).reshape(24, 32)
    return {"w": adapter["w"] + np.float32(0.2) * (target - adapter["w"] + noise)}


def rounds(folder: Path, count: int) -> None:
    server = folder / "server"
    with Store(folder / "device") as store:
        while True:
            state = json.loads(server.read_bytes()) if server.exists() else {"next": 0}
            number = state["next"]
            if number == count:
                return
            adapter = START
            if number:
                blob = unpack((folder / f"adapter-{number}").read_bytes())
                adapter = {n: e.parts["values"].astype(np.float32) for n, e in blob.tensors.items()}
            update = encode_with_feedback(
                trained(adapter, number),
                adapter,
                scheme_of(number, number - 1 if number else None),
                store.residuals,
                seed=number,
                importance={},
                precision="fp32",
            )
            change = {n: wire.decode(e, n, update.header) for n, e in update.tensors.items()}
            after = {name: raw(adapter[name] + change[name]) for name in adapter}
            write_durably(folder / f"adapter-{number + 1}", pack(Bundle(after)))
            write_durably(server, json.dumps({"next": number + 1}).encode())


def kill_at(place: int) -> None:
    """Let the process die around its n-th replacement of a file."""
    replace, calls = os.replace, 0

    def replacing(source: str, target: str) -> None:
        nonlocal calls
        calls += 1
        if calls == place:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if calls == -place:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replacing  # type: ignore[assignment]  # dies where a power cut would strike


if __name__ == "__main__":
    kill_at(int(sys.argv[3]))
    rounds(Path(sys.argv[1]), int(sys.argv[2]))
