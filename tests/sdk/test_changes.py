# SPDX-License-Identifier: Apache-2.0
"""Adapters that come as changes: rebuilt where the base is held, and else downloaded whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import put
from tests.sdk.loopback import refuse
from tests.sdk.test_client import Device, Federation, assert_same

from lorikit.proto.manifest import BlobRef, digest_of
from lorikit.proto.plan import WireScheme
from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Bundle, Tensors, pack, raw
from lorikit.proto.v1 import device_service_pb2 as pb
from lorikit.proto.v1 import tensor_pb2
from lorikit.proto.wire import blob_to_message
from lorikit.quantization import changes
from lorikit.sdk import Downloaded, State
from lorikit.sdk._store import Store

SCHEME = WireScheme(codec="int4")


class ChangingFederation(Federation):
    """A server whose second task starts from an adapter that comes as a change."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.first = self.adapter
        base = self.tiny.adapter()
        exact = {name: values + np.float32(0.25) for name, values in base.items()}
        header = changes.header_of(SCHEME, seed=1)
        values = changes.difference(base, exact)
        bundle = Bundle(changes.encode(values, SCHEME, header, {}), {}, header)
        self.second_values: Tensors = changes.rebuilt(base, bundle, base, max_bytes=1 << 20)
        self.second = self.adapter_blob(self.second_values)
        self.change = put(folder, pack(bundle))

    def offer_second(self, name: str = "task-2", **refs: BlobRef) -> None:
        """A task with the second adapter, and the change that leads to it."""
        self.adapter = self.second
        self.offer_task(name)
        change = pb.AdapterChange(
            base=blob_to_message(refs.get("base", self.first)),
            blob=blob_to_message(refs.get("blob", self.change)),
        )
        self.offers[-1].task.change.CopyFrom(change)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ChangingFederation]:
    folder = tmp_path / "server"
    folder.mkdir()
    with ChangingFederation(folder) as server:
        yield server


@pytest.fixture
def device(server: ChangingFederation, tmp_path: Path) -> Device:
    return Device(server, tmp_path / "device")


@pytest.fixture
def from_whole(server: ChangingFederation, tmp_path: Path) -> Tensors:
    """What a device yields that downloads the second adapter whole."""
    server.adapter = server.second
    server.offer_task("whole")
    server.offer_end()
    Device(server, tmp_path / "whole").run()
    server.offers.clear()
    server.adapter = server.first
    return server.update("whole")


def fetched(device: Device) -> set[str]:
    return {event.digest for event in device.seen(Downloaded)}  # type: ignore[attr-defined]


def test_held_base_and_a_change_give_the_same_bits_as_the_whole(
    server: ChangingFederation, device: Device, from_whole: Tensors
) -> None:
    server.offer_task("task-1")
    server.offer_second("task-2")
    server.offer_end()
    assert device.run() is State.FINISHED

    assert_same(server.update("task-2"), from_whole)
    assert server.change.digest in fetched(device)
    assert server.second.digest not in fetched(device)
    assert server.change.size < server.second.size


def test_change_is_used_after_a_restart_and_a_new_enrolment(
    server: ChangingFederation, device: Device, from_whole: Tensors
) -> None:
    server.offer_task("task-1")
    server.offer_end()
    device.run()
    server.offers.clear()
    server.token = "another"
    server.offer_second("task-2")
    server.offer_end(server.second)
    device.events.clear()
    assert device.run() is State.FINISHED

    assert_same(server.update("task-2"), from_whole)
    assert server.second.digest not in fetched(device)


def test_unknown_base_leads_to_the_whole(
    server: ChangingFederation, device: Device, from_whole: Tensors
) -> None:
    server.offer_second("task-2")
    server.offer_end()
    assert device.run() is State.FINISHED

    assert_same(server.update("task-2"), from_whole)
    assert server.change.digest not in fetched(device)
    assert server.second.digest in fetched(device)


def test_damaged_base_leads_to_the_whole(
    server: ChangingFederation, device: Device, from_whole: Tensors
) -> None:
    server.offer_task("task-1")
    server.offer_end()
    device.run()
    with Store(device.store) as store:
        path = store.blobs.path(server.first.digest)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    server.offers.clear()
    server.offer_second("task-2")
    server.offer_end(server.second)
    assert device.run() is State.FINISHED

    assert_same(server.update("task-2"), from_whole)
    assert server.second.digest in fetched(device)


def wrong_change(server: ChangingFederation, kind: str) -> bytes:
    """A change that must not be used."""
    if kind == "no bundle":
        return b"\xff" * 40
    base = server.tiny.adapter()
    if kind == "no header":
        return pack(Bundle({name: raw(values) for name, values in base.items()}))
    header = changes.header_of(SCHEME, seed=1)
    other = {name: values + np.float32(0.5) for name, values in base.items()}
    tensors = changes.encode(changes.difference(base, other), SCHEME, header, {})
    packed = pack(Bundle(tensors, {}, header))
    if kind == "another version":
        message = tensor_pb2.TensorBundle.FromString(packed)
        message.wire.version = 2
        return message.SerializeToString(deterministic=True)
    return packed


@pytest.mark.parametrize("kind", ["no bundle", "no header", "another version", "another result"])
def test_change_that_does_not_lead_to_the_adapter_leads_to_the_whole(
    server: ChangingFederation, device: Device, from_whole: Tensors, kind: str
) -> None:
    data = wrong_change(server, kind)
    put(server.folder, data)
    server.offer_task("task-1")
    server.offer_second("task-2", blob=BlobRef(digest=digest_of(data), size=len(data)))
    server.offer_end()
    assert device.run() is State.FINISHED

    assert_same(server.update("task-2"), from_whole)
    assert server.second.digest in fetched(device)


def test_change_that_the_server_has_lost_leads_to_the_whole(
    server: ChangingFederation, device: Device, from_whole: Tensors
) -> None:
    server.offer_task("task-1")
    server.offer_second("task-2", blob=BlobRef(digest="0" * 64, size=100))
    server.offer_end()
    assert device.run() is State.FINISHED
    assert_same(server.update("task-2"), from_whole)


def test_interrupted_download_of_a_change_goes_on(
    server: ChangingFederation, device: Device, from_whole: Tensors
) -> None:
    server.chunk_bytes = 100
    server.offer_task("task-1")
    server.offer_second("task-2")
    server.offer_end()
    server.faults["DownloadBlob"].append(refuse(ErrorCode.SERVER_BUSY, 0.01))
    assert device.run() is State.FINISHED
    assert_same(server.update("task-2"), from_whole)
    assert server.second.digest not in fetched(device)
