# SPDX-License-Identifier: Apache-2.0
"""A device killed at work: it resumes, the round completes, nothing is counted twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from tests.integration.outcomes import assert_counted_once, outcome
from tests.integration.processes import Device, Process, Server, make_devices, until
from tests.integration.relay import Gate, Relay

from lorikit.proto.v1 import device_service_pb2 as pb

pytest.importorskip("torch", reason="the server compiles with torch")

pytestmark = pytest.mark.slow

MEBIBYTE = 1 << 20


class Federation:
    """The survival run with one device behind a relay: the one that is killed."""

    def __init__(self, server: Server, relay: Relay, devices: list[Device]) -> None:
        self.server, self.relay, self.devices = server, relay, devices
        self.victim = devices[0]

    def start(self) -> None:
        for device in self.devices:
            device.start()

    def revive(self) -> tuple[Process, Process]:
        """Kill the victim and start it again; its first and its second life."""
        first = self.victim.process
        first.kill()
        self.victim.start()
        return first, self.victim.process

    def end(self, survival, undisturbed) -> None:
        assert self.server.ended(survival.name).state == "finished"
        assert [device.process.wait() for device in self.devices] == [0, 0, 0]
        assert_counted_once(self.server, survival.name, self.devices, survival.rounds)
        assert outcome(self.server, survival.name) == undisturbed


@pytest.fixture
def federation(survival, compiled, tmp_path) -> Iterator[Federation]:
    with contextlib.ExitStack() as running:
        server = running.enter_context(Server(tmp_path / "server", compiled=compiled).start())
        relay = running.enter_context(Relay(server.address))
        devices = make_devices(tmp_path, server.address)
        devices[0].address = relay.address
        for device in devices:
            running.enter_context(device)
        server.create(survival)
        yield Federation(server, relay, devices)


def test_device_killed_while_training_goes_on_from_its_journal(federation, survival, undisturbed):
    federation.start()
    federation.victim.process.wait_for("Progress", step=lambda step: step >= 14)
    first, second = federation.revive()
    federation.end(survival, undisturbed)

    assert not first.seen("RoundDone")
    assert second.wait_for("TaskStarted")["resumed"]
    steps = [line["step"] for line in second.seen("Progress")][: survival.local_steps]
    assert 10 < steps[0] <= 1 + max(line["step"] for line in first.seen("Progress"))


def test_device_killed_while_downloading_goes_on_by_offset(federation, survival, undisturbed):
    gate = Gate()

    def chunk(message: pb.DownloadBlobResponse) -> pb.DownloadBlobResponse:
        if message.offset >= 2 * MEBIBYTE:
            gate.hold()
        return message

    federation.relay.chunk = chunk
    federation.start()
    held = federation.victim.process.wait_for("Downloaded", received_bytes=2 * MEBIBYTE)
    gate.wait_until_reached()
    federation.relay.chunk = lambda message: message
    _, second = federation.revive()
    gate.open()
    federation.end(survival, undisturbed)

    received = [line["received_bytes"] for line in second.seen("Downloaded", digest=held["digest"])]
    assert received[0] == 3 * MEBIBYTE
    assert received[-1] == held["total_bytes"]


def test_device_killed_while_uploading_sends_the_rest_without_training(
    federation, survival, undisturbed
):
    gate = Gate()

    def sent(message: pb.UploadUpdateRequest) -> pb.UploadUpdateRequest:
        if message.chunk.offset >= 2 * MEBIBYTE:
            gate.hold()
        return message

    federation.relay.sent = sent
    federation.start()
    gate.wait_until_reached()
    until(lambda: federation.server.held_bytes() == 2 * MEBIBYTE, "two chunks of the update")
    federation.relay.sent = lambda message: message
    first, second = federation.revive()
    gate.open()
    federation.end(survival, undisturbed)

    assert not first.seen("RoundDone")
    assert second.wait_for("TaskStarted")["resumed"]
    done = second.wait_for("RoundDone")
    before = second.lines[: second.lines.index(done)]
    sent_bytes = [line["sent_bytes"] for line in before if line["event"] == "Uploaded"]
    assert sent_bytes[0] == 3 * MEBIBYTE
    assert not [line for line in before if line["event"] == "Progress"]


def test_device_killed_before_it_hears_of_its_receipt_does_not_send_again(
    federation, survival, undisturbed
):
    gate = Gate()

    def receipt(message: pb.UploadUpdateResponse) -> pb.UploadUpdateResponse:
        gate.hold()
        return message

    federation.relay.receipt = receipt
    federation.start()
    gate.wait_until_reached()
    federation.relay.receipt = lambda message: message
    _, second = federation.revive()
    gate.open()
    federation.end(survival, undisturbed)

    (round_one,) = second.seen("RoundDone")
    assert round_one["round"] == 1
