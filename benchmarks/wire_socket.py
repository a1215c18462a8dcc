# SPDX-License-Identifier: Apache-2.0
"""Bytes on the socket: a real server, real devices over gRPC, and a relay that counts.

The same run goes once through ``federation``. Updates and adapters must have the same bytes; what
the socket carries beyond the counted messages is HTTP/2 and metadata.

    python benchmarks/wire_socket.py [--folder FOLDER] [--output docs/results/wire.json]
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import threading
from pathlib import Path
from typing import Any

from federation import Federation, GivenChoices
from wire_runs import Bench, clinc150, emptied

from lorikit.sdk import Client, Event, RoundDone
from lorikit.sdk._store import Identity, Store
from lorikit.server.app import Server, make_method
from lorikit.server.config import RunConfig, ServerConfig
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.work import RunParts

ROUNDS = 4
SCHEME: dict[str, Any] = {"codec": "int4", "downlink_codec": "int4"}
PIECE = 1 << 16


class CountingRelay:
    """Passes TCP connections on to a server, and counts what goes through them."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.up = self.down = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._server.rpartition(":")
            server = socket.create_connection((host, int(port)))
            for source, target, direction in ((device, server, "up"), (server, device, "down")):
                arguments = (source, target, direction)
                threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(PIECE):
                setattr(self, direction, getattr(self, direction) + len(data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


class CountedDevice:
    """A client behind a relay of its own."""

    def __init__(self, member: Any, server: str, folder: Path) -> None:
        self.name = member.name
        self.relay = CountingRelay(server)
        self.seen: list[tuple[int, int, RoundDone]] = []
        with Store(folder) as store:
            store.save_identity(Identity(installation_id=member.name))
        self.client = Client(
            self.relay.address,
            data=member.rows,
            store=folder,
            insecure=True,
            threads=1,
            engine="onnx",
            speed_gflops=1.0,
            on_event=self._note,
        )

    def _note(self, event: Event) -> None:
        if isinstance(event, RoundDone):
            self.seen.append((self.relay.up, self.relay.down, event))


def over_grpc(bench: Bench, config: RunConfig, folder: Path) -> dict[str, list[dict[str, int]]]:
    """Bytes by device and round, from the second round on."""
    members = bench.members(0)

    def open_parts(config: RunConfig, blobs: FolderBlobs) -> RunParts:
        return RunParts(
            method=make_method(config),
            source=bench.model.compiler,
            planner=GivenChoices(config, members, bench.model.compiler.layer_count),
            export=lambda *_: None,
        )

    server_config = ServerConfig(folder=folder, address="localhost:0")
    with Server(server_config, open_parts=open_parts) as server:
        server.create_run(config)
        devices = [CountedDevice(m, server.address, folder / m.name) for m in members]
        threads = [threading.Thread(target=device.client.run) for device in devices]
        for thread in threads:
            thread.start()
        summary = server.wait(config.name, timeout=1800.0)
        assert summary.state == "finished", summary
        for thread in threads:
            thread.join()
        for device in devices:
            device.client.close()
            device.relay.close()
    return {
        device.name: [
            {
                "up": after[0] - before[0],
                "down": after[1] - before[1],
                "update": after[2].bytes_up,
                "adapter": after[2].bytes_down,
            }
            for before, after in zip(device.seen, device.seen[1:], strict=False)
        ]
        for device in devices
    }


def in_process(bench: Bench, config: RunConfig, folder: Path) -> dict[str, list[dict[str, int]]]:
    """The same of the same run in one process."""
    federation = Federation(bench.model, config, bench.members(0), folder=folder)
    rounds = [federation.round() for _ in range(ROUNDS)]
    federation.close()
    fields = ("up", "down", "update", "adapter")
    return {
        name: [
            {field: getattr(each.traffic[name], field) for field in fields} for each in rounds[1:]
        ]
        for name in rounds[0].traffic
    }


def compared(folder: Path) -> dict[str, Any]:
    """Both counts, and what the socket carries on top."""
    with emptied(folder) as empty:
        server_folder = empty / "server"
        bench = Bench(
            clinc150(), empty, blobs=ServerConfig(folder=server_folder).private_folder / "blobs"
        )
        config = bench.config(
            "socket", 0, rounds=ROUNDS, min_updates=len(bench.members(0)), **SCHEME
        )
        socket_count = over_grpc(bench, config, server_folder)
        local_count = in_process(bench, config, empty / "local")
    for name, rounds in socket_count.items():
        for ours, theirs in zip(local_count[name], rounds, strict=True):
            same = {field: (ours[field], theirs[field]) for field in ("update", "adapter")}
            assert all(a == b for a, b in same.values()), (name, same)

    def mean(counts: dict[str, list[dict[str, int]]], field: str) -> float:
        return statistics.mean(each[field] for rounds in counts.values() for each in rounds)

    return {
        "command": "python benchmarks/wire_socket.py",
        "run": f"CLINC150, int4 + EF both ways, {ROUNDS} rounds; means of rounds 1 to {ROUNDS - 1}",
        "updates_and_adapters_equal": True,
        **{
            f"{where}_{field}": mean(counts, field)
            for where, counts in (("socket", socket_count), ("messages", local_count))
            for field in ("up", "down")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("wire-benchmark/socket"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/wire.json"))
    options = parser.parse_args()
    result = compared(options.folder)
    print(json.dumps(result, indent=2))
    report = json.loads(options.output.read_text()) if options.output.exists() else {}
    report["socket"] = result
    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
