# SPDX-License-Identifier: Apache-2.0
"""Adapters that travel to devices as changes: what is shared, what is exact, and whole runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tests.server.federation import (
    Crowd,
    Device,
    final_adapters,
    profile,
    run_config,
    server_config,
    start_server,
    train,
)

from lorikit.proto.tensors import Bundle, Tensors, pack, raw, unpack
from lorikit.quantization import changes, wire
from lorikit.server.app import check_run
from lorikit.server.downlink import (
    Change,
    Downlink,
    as_from_exact,
    change_from_json,
    change_to_json,
    downlink_scheme,
    shared_bases,
)
from lorikit.server.errors import RequestError
from lorikit.server.methods import FACTS
from lorikit.server.methods.base import Assignment
from lorikit.server.states import RunState
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.updates import Update, read_adapter


def adapter(seed: int, rank: int = 8) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"q.lora_A.weight": (rank, 96), "q.lora_B.weight": (96, rank)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


@pytest.fixture
def downlink(tmp_path: Path, blobs: FolderBlobs) -> Downlink:
    return Downlink(run_config(tmp_path, downlink_codec="int4"), blobs)


def test_device_without_a_version_gets_the_exact_values_whole(
    downlink: Downlink, blobs: FolderBlobs
) -> None:
    version = downlink.version(adapter(0), None, round_number=0)
    assert version.change is None
    got = read_adapter(blobs.read_whole(version.adapter.digest))
    np.testing.assert_array_equal(got["q.lora_A.weight"], adapter(0)["q.lora_A.weight"])
    unknown = downlink.version(adapter(0), "0" * 64, round_number=0)
    assert unknown == version


def test_change_rebuilds_the_published_version_to_the_bit_in_a_sixth(
    downlink: Downlink, blobs: FolderBlobs
) -> None:
    first = downlink.version(adapter(0), None, round_number=0)
    second = downlink.version(adapter(1), first.adapter.digest, round_number=1)
    assert second.change is not None
    assert second.change.base == first.adapter
    assert 6 * second.change.blob.size < second.adapter.size

    bundle = unpack(blobs.read_whole(second.change.blob.digest))
    bundle = wire.expanded(bundle, max_bytes=second.adapter.size)
    base = read_adapter(blobs.read_whole(first.adapter.digest))
    values = changes.rebuilt(base, bundle, adapter(1), max_bytes=second.adapter.size)
    data = pack(Bundle({name: raw(value) for name, value in values.items()}))
    assert hashlib.sha256(data).hexdigest() == second.adapter.digest


def test_equal_bases_share_one_encoding_and_a_restarted_server_makes_the_same(
    downlink: Downlink, blobs: FolderBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = changes.encode

    def counted(*arguments):
        encoded.append(arguments)
        return encode(*arguments)

    monkeypatch.setattr(changes, "encode", counted)
    first = downlink.version(adapter(0), None, round_number=0)
    before = set(blobs.digests())
    versions = [
        downlink.version(adapter(1), first.adapter.digest, round_number=1) for _ in range(3)
    ]
    assert versions[0] == versions[1] == versions[2]
    assert len(encoded) == 1
    assert len(set(blobs.digests()) - before) == 2

    restarted = Downlink(run_config(tmp_path, downlink_codec="int4"), blobs)
    again = restarted.version(adapter(1), first.adapter.digest, round_number=1)
    assert again == versions[0]


def test_values_that_stay_need_nothing(downlink: Downlink) -> None:
    first = downlink.version(adapter(0), None, round_number=0)
    assert downlink.version(adapter(0), first.adapter.digest, round_number=1) == first


def test_change_that_saves_nothing_is_not_offered(tmp_path: Path, blobs: FolderBlobs) -> None:
    tiny = Downlink(run_config(tmp_path, downlink_codec="fp16"), blobs)
    values = [{"bias": np.full(2, n, np.float32)} for n in (1, 2)]
    first = tiny.version(values[0], None, round_number=0)
    second = tiny.version(values[1], first.adapter.digest, round_number=1)
    assert second.change is None
    np.testing.assert_array_equal(
        read_adapter(blobs.read_whole(second.adapter.digest))["bias"], values[1]["bias"]
    )


def test_rank_may_change_between_versions(downlink: Downlink, blobs: FolderBlobs) -> None:
    held = downlink.version(adapter(0, rank=8), None, round_number=0)
    for number, rank in enumerate((5, 8), start=1):
        exact = adapter(number, rank=rank)
        held = downlink.version(exact, held.adapter.digest, round_number=number)
        assert held.change is not None
        got = read_adapter(blobs.read_whole(held.adapter.digest))
        for name, values in exact.items():
            assert got[name].shape == values.shape
            assert np.abs(got[name] - values).max() < 0.5


def test_update_counts_from_the_exact_values_not_from_the_version() -> None:
    received, exact = adapter(0), adapter(1)
    trained = {name: values[..., :5] + 1 for name, values in received.items()}
    trained["statistics.sums"] = np.ones((3, 4), np.float32)
    update = as_from_exact(Update(trained, {}), received, exact)
    for name, values in exact.items():
        np.testing.assert_allclose(update.tensors[name], values[..., :5] + 1, atol=1e-6)
    np.testing.assert_array_equal(update.tensors["statistics.sums"], 1)


def assignment(device: str, rank: int) -> Assignment:
    return Assignment(device_id=device, ranks={"q": rank}, trained_layers=(0,), kept_layers=(0,))


def test_device_without_a_version_joins_most_of_those_with_its_work() -> None:
    work = [assignment(d, 4) for d in "abcd"] + [assignment("e", 2), assignment("f", 2)]
    held: dict[str, str | None] = {"a": "x", "b": "y", "c": "y", "d": None, "e": None}
    assert shared_bases(work, held) == {
        **{"a": "x", "b": "y", "c": "y", "d": "y"},
        **{"e": None, "f": None},
    }


def test_change_survives_the_store(blobs: FolderBlobs) -> None:
    change = Change(blobs.put(b"one"), blobs.put(b"two"))
    assert change_from_json(change_to_json(change)) == change
    assert change_from_json(change_to_json(None)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"downlink_codec": "zip"}, "unknown wire scheme 'zip'"),
        ({"downlink_codec": "adaptive"}, "needs budget_bytes in downlink_options"),
        (
            {"downlink_codec": "int4", "downlink_options": {"error_feedback": True}},
            "downlink_options: 'error_feedback' is unknown",
        ),
        (
            {"downlink_codec": "int4", "downlink_options": {"rotation_block": "x"}},
            "downlink_options: rotation_block must be of type int",
        ),
        ({"downlink_codec": "int4", "method": "flexlora"}, "does not go with method flexlora"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError) as caught:
        check_run(run_config(tmp_path, **settings))
    assert message in caught.value.detail


def test_methods_that_move_their_coordinates_take_eight_bits(tmp_path: Path) -> None:
    moving = sorted(name for name, facts in FACTS.items() if not facts.keeps_coordinates)
    assert moving == ["flexlora", "flora", "frlora", "lora-a2"]
    for name in moving:
        config = run_config(tmp_path, method=name, downlink_codec="int8-block64")
        assert downlink_scheme(config) is not None


class HoldingDevice(Device):
    """A device that keeps what it got, and takes a change where it holds the base."""

    def take(self, task) -> Tensors:
        data = self.held.get(task.adapter.digest)
        if data is not None:
            self.received.append(("held", 0))
        elif task.HasField("change") and task.change.base.digest in self.held:
            base = read_adapter(self.held[task.change.base.digest])
            packed = self.download(task.change.blob)
            bundle = wire.expanded(unpack(packed), max_bytes=task.adapter.size)
            values = changes.rebuilt(base, bundle, base, max_bytes=task.adapter.size)
            data = pack(Bundle({name: raw(value) for name, value in values.items()}))
            assert hashlib.sha256(data).hexdigest() == task.adapter.digest
            self.received.append(("change", len(packed)))
        if data is None:
            data = self.download(task.adapter)
            self.received.append(("whole", len(data)))
        self.held[task.adapter.digest] = data
        self.versions.append(task.adapter.digest)
        if self.forgets and len(self.versions) == 2:
            self.held.clear()
        return read_adapter(data)

    def update(self, task) -> bytes:
        return self.packed(train(task, self.take(task), self.examples))

    def work(self, task) -> None:
        if task.kind == "evaluate":
            self.take(task)
        super().work(task)


def run_with(
    folder: Path, *, forgetful: int | None = None, **settings: object
) -> tuple[Tensors, list[HoldingDevice]]:
    """The final adapter of a run of three devices over gRPC, and the devices."""
    devices = []
    with start_server(server_config(folder / "runs")) as server:
        server.create_run(run_config(folder, min_updates=3, **settings))
        for number in range(3):
            device = HoldingDevice(
                server.address, name=f"installation-{number}", profile=profile((20, 40, 40)[number])
            )
            device.held, device.received, device.versions = {}, [], []
            device.forgets = number == forgetful
            devices.append(device)
        with Crowd(devices):
            assert server.wait("test", timeout=60.0).state is RunState.FINISHED
    *_, final = final_adapters(folder / "runs" / "test" / "adapter").values()
    return read_adapter(final), devices


@pytest.fixture
def tiny_matrices_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SMALL", 4)  # this model's matrices are tiny


@pytest.mark.usefixtures("tiny_matrices_quantised")
@pytest.mark.parametrize("method", ["fedit", "hetlora"])
def test_run_with_changes_ends_where_one_with_whole_adapters_does(
    tmp_path: Path, method: str
) -> None:
    """The tiny devices' steps do not depend on what they start from: only the version is coarse,
    and what it leaves out stays with the server."""
    options = {"rank_rule": "budget"} if method == "hetlora" else {}
    settings = {"method": method, "method_options": options, "rounds": 4}
    whole, _ = run_with(tmp_path / "whole", **settings)
    near, devices = run_with(
        tmp_path / "few", downlink_codec="int4", downlink_options={"compressed": False}, **settings
    )
    for name, values in whole.items():
        np.testing.assert_allclose(near[name], values, atol=1e-5, err_msg=name)
    for device in devices:
        kinds = [kind for kind, _ in device.received]
        assert kinds == ["whole", "change", "change", "change"]
    if method == "fedit":
        assert len({tuple(device.versions) for device in devices}) == 1


@pytest.mark.usefixtures("tiny_matrices_quantised")
def test_device_that_lost_its_version_gets_the_common_one_whole(tmp_path: Path) -> None:
    _, devices = run_with(tmp_path, forgetful=1, downlink_codec="int4", rounds=4)
    assert [kind for kind, _ in devices[1].received] == ["whole", "change", "whole", "change"]
    assert devices[1].versions == devices[0].versions == devices[2].versions


@pytest.mark.usefixtures("tiny_matrices_quantised")
def test_device_that_measured_the_new_adapter_already_has_it(tmp_path: Path) -> None:
    _, devices = run_with(tmp_path, downlink_codec="int4", rounds=3, evaluate_on_devices=True)
    for device in devices:
        kinds = [kind for kind, _ in device.received]
        assert kinds == ["whole", "change", "held", "change", "held", "change"]
