# SPDX-License-Identifier: Apache-2.0
"""What is broken or foreign: an error that names its cause, and the run goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.integration.outcomes import assert_counted_once, outcome
from tests.integration.processes import Device, Server, make_devices, until
from tests.integration.relay import CutOffError, Gate, Relay
from tests.server.federation import Device as RawDevice
from tests.server.federation import error_code, profile, upload_requests

from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Tensors, unpack
from lorikit.proto.v1 import device_service_pb2 as pb
from lorikit.proto.v1 import plan_pb2
from lorikit.sdk.__main__ import ExitCode
from lorikit.server.config import RunConfig

pytest.importorskip("torch", reason="the packages are compiled with torch")

pytestmark = pytest.mark.slow

MEBIBYTE = 1 << 20
QUERY_A = "bert.encoder.layer.0.attention.self.query.lora_A.weight"


class Federation:
    """A server, relays to it, and devices; all ended at the end."""

    def __init__(self, folder: Path, compiled: Path, running: contextlib.ExitStack) -> None:
        self.folder, self.compiled, self.running = folder, compiled, running
        self.devices: list[Device] = []

    def serve(self, config: RunConfig, **settings: float) -> Server:
        server = Server(self.folder / "server", compiled=self.compiled, settings=settings)
        self.server = self.running.enter_context(server.start())
        self.server.create(config)
        self.config = config
        return self.server

    def relay(self) -> Relay:
        return self.running.enter_context(Relay(self.server.address))

    def add_devices(self, count: int) -> list[Device]:
        self.devices = make_devices(self.folder, self.server.address, count)
        for device in self.devices:
            self.running.enter_context(device)
        return self.devices

    def start(self) -> None:
        for device in self.devices:
            device.start()

    def end(self) -> list[int]:
        """Wait for the run's end; the devices' exit codes."""
        summary = self.server.ended(self.config.name)
        assert (summary.state, summary.round) == ("finished", self.config.rounds), summary
        return [device.process.wait() for device in self.devices]

    def reported(self, round_number: int) -> dict[str, tuple[str, str, str]]:
        """State, error and message of each device in a round, by class."""
        devices = self.server.report(self.config.name)["rounds"][round_number]["devices"]
        return {d["class"]: (d["status"], d["error"], d["message"]) for d in devices}


@pytest.fixture
def federation(compiled, tmp_path) -> Iterator[Federation]:
    with contextlib.ExitStack() as running:
        yield Federation(tmp_path, compiled, running)


@pytest.fixture(scope="module")
def short(survival: RunConfig) -> Callable[..., RunConfig]:
    """The survival run with few steps, closing with what two devices send."""

    def settings(**changes: Any) -> RunConfig:
        fields = {"local_steps": 4, "min_updates": 2, **changes}
        return RunConfig.model_validate({**survival.model_dump(), **fields})

    return settings


def once(hook: Callable[[Any], Any], when: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A hook that does its work on the first message of its kind."""
    waiting = [True]

    def hooked(message: Any) -> Any:
        if waiting and when(message):
            waiting.clear()
            return hook(message)
        return message

    return hooked


def cut(message: object) -> object:
    raise CutOffError


def damaged_chunk(message: pb.DownloadBlobResponse) -> pb.DownloadBlobResponse:
    message.data = message.data[:1000] + bytes([message.data[1000] ^ 1]) + message.data[1001:]
    return message


def damaged_upload(message: pb.UploadUpdateRequest) -> pb.UploadUpdateRequest:
    data = message.chunk.data
    message.chunk.data = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    return message


def test_damaged_and_truncated_streams_are_repaired(federation, survival, undisturbed):
    server = federation.serve(survival)
    damaged, truncated, _ = federation.add_devices(3)
    first, second = federation.relay(), federation.relay()
    damaged.address, truncated.address = first.address, second.address
    first.chunk = once(damaged_chunk, lambda m: m.offset == MEBIBYTE)
    first.sent = once(damaged_upload, lambda m: m.chunk.offset == MEBIBYTE)
    second.chunk = once(cut, lambda m: m.offset == 2 * MEBIBYTE)
    second.sent = once(cut, lambda m: m.chunk.offset == 2 * MEBIBYTE)
    federation.start()

    assert federation.end() == [0, 0, 0]
    assert f"chunk at byte {MEBIBYTE} is damaged" in damaged.process.text()
    assert "does not match its digest; send it again. chunk at" in damaged.process.text()
    (lost,) = truncated.process.seen("Disconnected")
    assert f"ended {lost_bytes(truncated) - 2 * MEBIBYTE} bytes early" in lost["message"]
    assert f"stream ended at {2 * MEBIBYTE} of" in truncated.process.text()
    assert_counted_once(server, survival.name, federation.devices, survival.rounds)
    assert outcome(server, survival.name) == undisturbed


def lost_bytes(device: Device) -> int:
    """Size of the blob whose download was cut off: the only one of several chunks."""
    large = device.process.seen("Downloaded", total_bytes=lambda size: size > 2 * MEBIBYTE)
    return int(large[0]["total_bytes"])


def test_device_that_gets_damaged_blobs_only_says_so(federation, short):
    federation.serve(short(rounds=1))
    unlucky, *_ = federation.add_devices(3)
    relay = federation.relay()
    unlucky.address = relay.address
    relay.chunk = lambda m: damaged_chunk(m) if m.offset == MEBIBYTE else m
    federation.start()
    failed = unlucky.process.wait_for("Failed")
    relay.chunk = lambda message: message

    assert federation.end() == [0, 0, 0]
    assert failed["error"] == "DamagedBlobError"
    assert f"chunk at byte {MEBIBYTE} is damaged" in failed["message"]
    reported = federation.reported(0)
    assert reported["device-0"] == ("failed", "DamagedBlobError", failed["message"])
    assert [reported[name][0] for name in ("device-1", "device-2")] == ["done", "done"]


def test_plan_with_unknown_parts_is_refused_by_name(federation, short):
    def unknown(reply: pb.NextTaskResponse) -> pb.NextTaskResponse:
        reply.task.plan.operations.append(plan_pb2.Operation(name="fold_space", version=3))
        return reply

    def newer(reply: pb.NextTaskResponse) -> pb.NextTaskResponse:
        reply.task.plan.version = 99
        return reply

    federation.serve(short(min_devices=4))
    devices = federation.add_devices(4)
    for device, hook in zip(devices[:2], (unknown, newer), strict=True):
        relay = federation.relay()
        relay.offer = once(hook, lambda reply: reply.HasField("task"))
        device.address = relay.address
    federation.start()

    assert federation.end() == [0, 0, 0, 0]
    reported = federation.reported(0)
    for name, words in (("device-0", "fold_space"), ("device-1", "plan version 99")):
        state, error, message = reported[name]
        assert (state, error) == ("failed", "PlanRefusedError")
        assert words in message
    assert [reported[f"device-{n}"][0] for n in (2, 3)] == ["done", "done"]
    assert {state for state, _, _ in federation.reported(1).values()} == {"done"}


def test_other_protocol_versions_end_the_device_that_cannot_understand(federation, short):
    federation.serve(short(min_devices=2), lease_seconds=5.0)
    newer_device, newer_server, *_ = federation.add_devices(4)
    first, second = federation.relay(), federation.relay()
    newer_device.address, newer_server.address = first.address, second.address
    first.metadata = lambda metadata: [("lorikit-protocol", "2"), *metadata[1:]]
    second.offer = lambda reply: pb.NextTaskResponse()
    federation.start()

    assert federation.end() == [ExitCode.PROTOCOL, ExitCode.PROTOCOL, 0, 0]
    for device, words in ((newer_device, "update the older one"), (newer_server, "update the SDK")):
        (error,) = device.process.seen("Error")
        assert error["error"] == "ProtocolVersionError"
        assert words in error["message"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[Path, str], None]]:
    """Mounts a small file system at a folder."""
    mounted = []

    def mount(folder: Path, size: str) -> None:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("a small file system needs root and the right to mount")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_on_the_device_is_told(federation, short, small_disk):
    federation.serve(short())
    poor, *_ = federation.add_devices(3)
    small_disk(poor.store, "3m")
    federation.start()

    assert federation.end() == [ExitCode.FAILED, 0, 0]
    for number in range(2):
        reported = federation.reported(number)
        assert reported["device-0"][:2] == ("failed", "StorageFullError")
        assert "bytes of room; free storage" in reported["device-0"][2]
        assert [reported[name][0] for name in ("device-1", "device-2")] == ["done", "done"]
    assert [line["error"] for line in poor.process.seen("Failed")] == ["StorageFullError"] * 2
    assert [line["error"] for line in poor.process.seen("Error")] == ["StorageFullError"]


def test_disk_too_small_for_the_journal_costs_no_work(
    federation, survival, undisturbed, small_disk
):
    """Two adapters fit, but not what the optimiser remembers of one."""
    server = federation.serve(survival)
    poor, *_ = federation.add_devices(3)
    small_disk(poor.store, "12m")
    federation.start()

    assert federation.end() == [0, 0, 0]
    assert "goes on without a new journal" in poor.process.text()
    assert_counted_once(server, survival.name, federation.devices, survival.rounds)
    assert outcome(server, survival.name) == undisturbed


def test_limit_on_the_size_of_files_is_told(federation, short):
    federation.serve(short(rounds=1))
    poor, *_ = federation.add_devices(3)
    poor.largest_file_bytes = 2 * MEBIBYTE
    federation.start()
    codes = federation.end()

    assert codes == [ExitCode.FAILED, 0, 0]
    assert federation.reported(0)["device-0"][:2] == ("failed", "StorageFullError")
    (error,) = poor.process.seen("Error")
    assert error["error"] == "StorageFullError"
    assert "File too large" in error["message"]


def test_missing_and_late_devices_do_not_hold_the_round(federation, short):
    """One device stands still; one sends its update too late, another the last chunk of it."""
    config = short(min_devices=4, min_updates=1, deadline_seconds=12.0)
    server = federation.serve(config)
    still, late, later, _ = federation.add_devices(4)
    gates = Gate(), Gate()
    for device, gate, start in zip((late, later), gates, (0, 4 * MEBIBYTE), strict=True):
        relay = federation.relay()
        device.address = relay.address
        relay.sent = once(
            lambda message, gate=gate: (gate.hold(), message)[1],
            lambda message, start=start: message.chunk.offset >= start,
        )
    federation.start()
    still.process.wait_for("StateChanged", state="downloading")
    still.process.stop()
    for gate in gates:
        gate.wait_until_reached()
    until(lambda: len(server.report(config.name)["rounds"]) == 2, "the next round")
    for gate in gates:
        gate.open()
    still.process.go_on()

    assert federation.end() == [0, 0, 0, 0]
    for device in (still, late, later):
        assert device.process.seen("Failed")[0]["error"] == "RoundClosedError"
    states = {name: state for name, (state, _, _) in federation.reported(0).items()}
    assert states == {
        "device-0": "expired", "device-1": "expired", "device-2": "expired", "device-3": "done",
    }  # fmt: skip
    assert {state for state, _, _ in federation.reported(1).values()} == {"done"}
    assert server.held_bytes() == 0


def test_updates_that_break_a_rule_are_refused_with_the_rule(federation, short):
    """A device made for it sends what no client of ours would, next to two honest ones."""
    federation.serve(short())
    federation.add_devices(2)
    federation.start()
    foe = RawDevice(federation.server.address, profile=profile(2000, device_class="foe")).enrol()

    task = next_task(foe)
    good = honest_update(foe, task)
    foe.protocol = "2"
    assert refusal(foe.heartbeat, task)[0] is ErrorCode.PROTOCOL_UNSUPPORTED
    foe.protocol = "1"
    data = foe.packed(good)
    code, words = refusal(foe.call, "UploadUpdate", spoilt(upload_requests(task, data)))
    assert (code, "chunk at 300 is damaged" in words) == (ErrorCode.UPDATE_CORRUPT, True)
    code, words = refusal(foe.upload, task, data, offset=300, stop=900)
    assert (code, "stream ended at 900 of" in words) == (ErrorCode.UPDATE_CORRUPT, True)
    code, words = refusal(foe.call, "UploadUpdate", upload_requests(task, data, total_size=1 << 33))
    assert (code, str(1 << 33) in words) == (ErrorCode.UPDATE_TOO_LARGE, True)
    bad = {**good, QUERY_A: np.full_like(good[QUERY_A], np.nan)}
    code, words = refusal(foe.upload, task, foe.packed(bad))
    assert code is ErrorCode.UPDATE_INVALID
    assert f"{QUERY_A}: holds numbers that are not finite" in words

    task = next_task(foe)
    good = honest_update(foe, task)
    bad = {**good, QUERY_A: good[QUERY_A][:, 1:]}
    code, words = refusal(foe.upload, task, foe.packed(bad))
    assert code is ErrorCode.UPDATE_INVALID
    assert f"{QUERY_A}: shape (768, 31) is not (768, 32)" in words

    assert federation.end() == [0, 0]
    for number, words in enumerate(("not finite", "(768, 31)")):
        reported = federation.reported(number)
        assert reported["foe"][:2] == ("rejected", "UPDATE_INVALID")
        assert words in reported["foe"][2]
        assert [reported[name][0] for name in ("device-0", "device-1")] == ["done", "done"]
    assert foe.next_task().WhichOneof("outcome") == "finished"
    foe.close()


def next_task(device: RawDevice) -> pb.Task:
    def ask() -> pb.Task | None:
        reply = device.next_task()
        return reply.task if reply.HasField("task") else None

    return until(ask, "a task")


def honest_update(device: RawDevice, task: pb.Task) -> Tensors:
    """The adapter as it came: what a device sends that learnt nothing."""
    bundle = unpack(device.download(task.adapter))
    names = [name for phase in task.plan.phases for name in phase.train]
    return {name: np.array(bundle.tensors[name].parts["values"]) for name in names}


def spoilt(requests: Iterator[pb.UploadUpdateRequest]) -> Iterator[pb.UploadUpdateRequest]:
    """The second chunk is not what its digest says."""
    for number, request in enumerate(requests):
        if number == 2:
            request.chunk.data = bytes(len(request.chunk.data))
        yield request


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[ErrorCode, str]:
    """Code and sentence of a call that must be refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **options)
    assert isinstance(caught.value, grpc.Call)
    return error_code(caught.value), caught.value.details() or ""
