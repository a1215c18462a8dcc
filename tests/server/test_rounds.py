# SPDX-License-Identifier: Apache-2.0
"""Runs with real gRPC and SQLite: rounds come to their end whatever devices and server do."""

from __future__ import annotations

import dataclasses
import errno
import json
import threading
import time

import grpc
import numpy as np
import pytest
from tests.server.federation import (
    Crowd,
    Device,
    crowd,
    error_code,
    eventually,
    final_adapters,
    open_tiny_parts,
    profile,
    run_config,
    server_config,
    start_server,
)

from lorikit.proto.status import ErrorCode
from lorikit.proto.v1 import device_service_pb2 as messages
from lorikit.proto.wire import profile_to_message
from lorikit.server.errors import RequestError
from lorikit.server.plans import identifier
from lorikit.server.states import RoundState, RunState, TaskState
from lorikit.server.store.sql import SqlStore

SECONDS = 40.0


class KilledError(RequestError):
    """Stands for the death of the process: nothing of it reaches the database."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.SERVER_STOPPING)


class Trap:
    """Kills a server's database when a chosen thing happens, once."""

    def __init__(self, place: str, number: int) -> None:
        self.place = place
        self.number = number
        self.sprung = threading.Event()
        self.server = None

    def spring(self, place: str, number: int) -> None:
        if (place, number) == (self.place, self.number) and not self.sprung.is_set():
            self.kill()
            raise KilledError

    def kill(self) -> None:
        def dead():
            raise KilledError

        self.sprung.set()
        self.server._coordinator._store._begin = dead

    def parts(self, config, blobs):
        parts = open_tiny_parts(config, blobs)
        return dataclasses.replace(
            parts, method=TrappedMethod(parts.method, self), export=self.exporting(parts.export)
        )

    def exporting(self, export):
        def write(folder, adapter, rank):
            if folder.parent.name == "adapter":
                self.spring("finish", 0)
            else:
                self.spring("export", int(folder.parent.name.removeprefix("round-")))
            export(folder, adapter, rank)

        return write


class TrappedMethod:
    """A method that tells a trap how far the run is."""

    def __init__(self, method, trap):
        self.method = method
        self.trap = trap
        self.name = method.name
        self.start = method.start
        self.broadcast = method.broadcast
        self.global_adapter = method.global_adapter
        self.number = 0

    def assign(self, state, space, number, cohort, rng):
        self.number = number
        self.trap.spring("assign", number)
        assignments = self.method.assign(state, space, number, cohort, rng)
        self.trap.spring("assigned", number)
        return assignments

    def aggregate(self, state, space, contributions):
        self.trap.spring("aggregate", self.number)
        after = self.method.aggregate(state, space, contributions)
        self.trap.spring("aggregated", self.number)
        return after


def undisturbed(folder, **changes):
    """Adapters of a run to which nothing happens."""
    config = run_config(folder, **changes)
    with start_server(server_config(folder / "calm")) as server:
        server.create_run(config)
        with crowd(server.address):
            assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
    return final_adapters(folder / "calm" / "test")


@pytest.fixture
def server(tmp_path):
    with start_server(server_config(tmp_path / "runs")) as server:
        yield server


@pytest.fixture
def devices(server):
    made = []

    def make(count=3, **changes):
        made.extend(
            Device(server.address, name=f"installation-{number}", **changes).enrol()
            for number in range(count)
        )
        return made

    yield make
    for device in made:
        device.close()


def test_run_ends_and_leaves_adapters_and_a_report(server, tmp_path):
    server.create_run(run_config(tmp_path, method="hetlora"))
    with crowd(server.address) as devices:
        summary = server.wait("test", timeout=SECONDS)
        devices.join()

    assert (summary.state, summary.round) == (RunState.FINISHED, 3)
    folder = tmp_path / "runs" / "test"
    expected = {f"adapter/rank-{r}/adapter.bundle" for r in (2, 4)} | {
        f"adapters/round-000{n}/rank-{r}/adapter.bundle" for n in range(3) for r in (2, 4)
    }
    assert set(final_adapters(folder)) == expected
    report = json.loads((folder / "report.json").read_text())
    assert [row["state"] for row in report["rounds"]] == ["closed"] * 3
    assert report["final_metric"] == summary.metric
    assert all(len(row["devices"]) == 3 for row in report["rounds"])
    for ending in devices.endings.values():
        assert ending.package.size > 0
        assert ending.adapter.size > 0
        assert ending.inputs == {"lora_scale": 2.0}


def test_two_runs_of_one_seed_are_equal_bit_for_bit(tmp_path):
    assert undisturbed(tmp_path / "a") == undisturbed(tmp_path / "b")


def test_other_seed_gives_another_adapter(tmp_path):
    assert undisturbed(tmp_path / "a") != undisturbed(tmp_path / "b", seed=8)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("assign", 0),
        ("assigned", 1),
        ("aggregate", 1),
        ("aggregated", 0),
        ("export", 1),
        ("finish", 0),
    ],
)
def test_server_killed_in_any_state_comes_to_the_same_result(tmp_path, place, number):
    expected = undisturbed(tmp_path, method="hetlora")
    config = server_config(tmp_path / "runs")
    trap = Trap(place, number)
    first = start_server(config, open_parts=trap.parts)
    trap.server = first
    address = first.address
    with crowd(address) as devices:
        first.create_run(run_config(tmp_path, method="hetlora"))
        assert trap.sprung.wait(SECONDS)
        first.stop()
        with start_server(config.model_copy(update={"address": address})) as second:
            assert second.wait("test", timeout=SECONDS).state is RunState.FINISHED
            devices.join()

    assert final_adapters(tmp_path / "runs" / "test") == expected


@pytest.mark.parametrize("receipts", [0, 1, 2])
def test_server_killed_between_updates_counts_each_once(tmp_path, receipts):
    expected = undisturbed(tmp_path, rounds=1)
    config = server_config(tmp_path / "runs")
    trap = Trap("", 0)
    trap.server = first = start_server(config, open_parts=trap.parts)
    first.create_run(run_config(tmp_path, rounds=1))
    devices = crowd(first.address).devices
    for device in devices:
        device.enrol()
    for device in devices:
        device.next_task(0.0)
    tasks = [device.task() for device in devices]
    for device, task in list(zip(devices, tasks, strict=True))[:receipts]:
        device.work(task)
    trap.kill()
    first.stop()

    with start_server(config.model_copy(update={"address": first.config.address})) as second:
        for device in devices:
            device.close()
        again = [Device(second.address, d.name, d.profile, d.examples).enrol() for d in devices]
        for device, task in zip(again, tasks, strict=True):
            answer = device.next_task(0.2)
            if answer.WhichOneof("outcome") == "task":
                assert answer.task == task
            device.upload(task, device.update(task))
        assert second.wait("test", timeout=SECONDS).state is RunState.FINISHED
        report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
        for device in again:
            device.close()

    assert [d["status"] for d in report["rounds"][0]["devices"]] == ["done"] * 3
    assert final_adapters(tmp_path / "runs" / "test") == expected


def test_device_that_comes_back_gets_the_same_task(server, devices, tmp_path):
    server.create_run(run_config(tmp_path))
    first, *_ = [device for device in devices() if device.next_task(0.0)]
    task = first.task()

    assert first.task() == task
    first.enrol()
    assert first.task() == task


def test_round_waits_for_its_devices(server, devices, tmp_path):
    server.create_run(run_config(tmp_path, min_devices=3))
    two = devices(2)

    assert [d.next_task(0.3).WhichOneof("outcome") for d in two] == ["wait", "wait"]


def test_cohort_is_a_share_of_the_devices(server, tmp_path):
    config = run_config(tmp_path, rounds=2, min_devices=4, min_updates=1, cohort_fraction=0.5)
    with crowd(server.address, 4) as devices:
        server.create_run(config)
        assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
        devices.join()

    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    assert [len(row["devices"]) for row in report["rounds"]] == [2, 2]
    assert all(ending.adapter.size for ending in devices.endings.values())


def test_device_that_does_not_fit_is_told_what_would_help(server, tmp_path):
    server.create_run(run_config(tmp_path, rounds=1, min_devices=2, min_updates=2))
    small = Device(server.address, "installation-small", profile(5))
    with Crowd([small]) as others:
        others.join()
    with crowd(server.address, 2) as devices:
        assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
        devices.join()

    refusal = others.endings["installation-small"]
    assert refusal.reason == "Rank 1 takes 10 MiB."
    assert refusal.remedy == "Allow the app 10 MiB."


def test_device_with_an_older_vocabulary_is_refused(server, tmp_path):
    server.create_run(run_config(tmp_path, rounds=1, min_devices=3, method="hetlora"))
    old = Device(server.address, "installation-old", profile(operations=("class_sums@1",)))
    with crowd(server.address, 2) as devices, Crowd([old]) as others:
        assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
        devices.join()
        others.join()

    assert "prune_tail@1" in others.endings["installation-old"].reason


def test_round_goes_on_without_a_silent_device(tmp_path):
    config = server_config(tmp_path / "runs", lease_seconds=0.5)
    with start_server(config) as server:
        server.create_run(run_config(tmp_path, rounds=1))
        silent = Device(server.address, "installation-silent").enrol()
        with crowd(server.address, 2) as devices:
            silent.next_task(0.0)
            assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
            devices.join()
        silent.close()

    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    states = {d["device"]: d["status"] for d in report["rounds"][0]["devices"]}
    assert states.pop(identifier("device", "installation-silent")) == "expired"
    assert set(states.values()) == {"done"}


def test_update_after_the_deadline_is_refused(server, devices, tmp_path):
    server.create_run(
        run_config(tmp_path, rounds=1, deadline_seconds=1.0, min_devices=2, min_updates=1)
    )
    quick, slow = devices(2)
    quick.next_task(0.0), slow.next_task(0.0)
    quick_task, slow_task = quick.task(), slow.task()
    update = slow.update(slow_task)
    quick.work(quick_task)
    assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED

    with pytest.raises(grpc.RpcError) as caught:
        slow.upload(slow_task, update)

    assert error_code(caught.value) is ErrorCode.ROUND_CLOSED
    assert not slow.heartbeat(slow_task).go_on


def test_late_update_completes_a_round_that_waits_for_devices(tmp_path):
    config = server_config(tmp_path / "runs", lease_seconds=0.5)
    with start_server(config) as server:
        server.create_run(run_config(tmp_path, rounds=1, min_devices=2, min_updates=2))
        quick, slow = (Device(server.address, f"installation-{n}").enrol() for n in range(2))
        quick.next_task(0.0), slow.next_task(0.0)
        task = slow.task()
        update = slow.update(task)
        quick.work(quick.task())
        store = server._coordinator._store
        run_id = server.summary("test").run_id
        eventually(lambda: store.round(run_id, 0).attempt == 1)
        slow.upload(task, update)

        assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
        assert [t.id for t in store.tasks(run_id, 0) if t.device_id == slow.device_id] == [
            task.task_id
        ]
        quick.close(), slow.close()


def test_silent_device_that_comes_back_finds_its_task(tmp_path):
    config = server_config(tmp_path / "runs", lease_seconds=0.5)
    with start_server(config) as server:
        server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
        device = Device(server.address).enrol()
        task = device.task()
        store = server._coordinator._store
        eventually(lambda: store.round(task.run_id, 0).state is RoundState.ASSIGNING)

        assert device.task() == task
        device.work(task)
        assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
        device.close()


def test_work_is_handed_out_anew_when_too_few_updates_come(server, devices, tmp_path):
    server.create_run(run_config(tmp_path, rounds=1, min_devices=2, min_updates=2))
    good, bad = devices(2)
    good.next_task(0.0), bad.next_task(0.0)
    good.work(good.task())
    first = bad.task()
    bad.fail(first)
    second = bad.task()
    bad.work(second)

    assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
    assert second.task_id != first.task_id
    assert second.plan == first.plan
    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    assert report["rounds"][0]["attempts"] == 2
    statuses = sorted(d["status"] for d in report["rounds"][0]["devices"])
    assert statuses == ["done", "done", "failed"]


def test_run_whose_devices_always_fail_says_why(server, devices, tmp_path):
    config = run_config(tmp_path, rounds=1, min_devices=1, min_updates=1, max_attempts=2)
    server.create_run(config)
    (device,) = devices(1)
    for _ in range(2):
        device.fail(device.task())

    summary = server.wait("test", timeout=SECONDS)

    assert summary.state is RunState.FAILED
    assert "0 of 1 needed updates in 2 attempts" in summary.message
    assert "OutOfMemoryError no memory" in summary.message
    assert device.next_task(0.0).WhichOneof("outcome") == "finished"


def test_invalid_update_is_refused_and_the_round_goes_on(server, devices, tmp_path):
    server.create_run(run_config(tmp_path, rounds=1, min_devices=2, min_updates=1))
    good, bad = devices(2)
    good.next_task(0.0), bad.next_task(0.0)
    task = bad.task()
    shape = (3, 6)
    tensors = {
        name: np.full(shape, np.nan, np.float32)
        for phase in task.plan.phases
        for name in phase.train
    }

    with pytest.raises(grpc.RpcError) as caught:
        bad.upload(task, bad.packed(tensors))
    good.work(good.task())

    assert error_code(caught.value) is ErrorCode.UPDATE_INVALID
    assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    assert sorted(d["status"] for d in report["rounds"][0]["devices"]) == ["done", "rejected"]


def test_run_stops_after_the_round(server, tmp_path):
    server.create_run(run_config(tmp_path, rounds=1000))
    with crowd(server.address) as devices:
        eventually(lambda: server.summary("test").round >= 1)
        server.stop_run("test")
        summary = server.wait("test", timeout=SECONDS)
        devices.join()

    assert summary.state is RunState.STOPPED
    assert 1 <= summary.round < 1000
    assert all(ending.adapter.size for ending in devices.endings.values())
    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    assert {row["state"] for row in report["rounds"]} == {"closed"}


def test_run_stops_at_once(server, devices, tmp_path):
    server.create_run(run_config(tmp_path, rounds=2))
    three = devices(3)
    for device in three:
        device.next_task(0.0)
    task = three[0].task()

    server.stop_run("test", at_once=True)

    assert server.wait("test", timeout=SECONDS).state is RunState.STOPPED
    assert not three[0].heartbeat(task).go_on
    assert three[0].next_task(0.0).WhichOneof("outcome") == "finished"


def test_stopped_run_does_not_start_again(tmp_path):
    config = server_config(tmp_path / "runs")
    with start_server(config) as server:
        server.create_run(run_config(tmp_path))
        server.stop_run("test", at_once=True)
        server.wait("test", timeout=SECONDS)
    with start_server(config) as server:
        assert server.wait("test", timeout=1.0).state is RunState.STOPPED


def test_devices_measure_the_adapter_where_the_run_asks_for_it(server, tmp_path):
    server.create_run(run_config(tmp_path, rounds=2, evaluate_on_devices=True))
    with crowd(server.address) as devices:
        assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
        devices.join()

    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    for row in report["rounds"]:
        assert len(row["device_metrics"]) == 3
        assert all(m == {"accuracy": 0.5} for m in row["device_metrics"].values())


def test_head_start_round_trains_nothing(server, tmp_path):
    server.create_run(
        run_config(tmp_path, rounds=2, head_start="class-means", server_optimizer="momentum")
    )
    with crowd(server.address) as devices:
        assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED
        devices.join()

    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    up = [row["bytes_up"] for row in report["rounds"]]
    assert up[0] < up[1]


def test_updates_are_removed_after_their_round(server, tmp_path):
    server.create_run(run_config(tmp_path))
    with crowd(server.address) as devices:
        server.wait("test", timeout=SECONDS)
        devices.join()

    store = server._coordinator._store
    kept = set(server._coordinator._kept.digests())
    run = store.run("test")
    states = {row.state_digest for row in store.rounds(run.id)} | {run.initial_digest}
    assert kept == states
    assert list((tmp_path / "runs" / ".server" / "uploads").iterdir()) == []


def test_two_runs_share_their_devices(server, tmp_path):
    with crowd(server.address) as devices:
        server.create_run(run_config(tmp_path, name="one", rounds=2))
        server.create_run(run_config(tmp_path, name="two", rounds=2, method="flexlora"))
        states = [server.wait(name, timeout=SECONDS).state for name in ("one", "two")]
        devices.join()

    assert states == [RunState.FINISHED] * 2


def test_server_that_restarts_waits_for_known_devices(tmp_path):
    config = server_config(tmp_path / "runs", settle_seconds=120.0)
    with start_server(config) as server:
        server.create_run(run_config(tmp_path, rounds=1000))
        with crowd(server.address):
            eventually(lambda: server.summary("test").round >= 1)
    with start_server(config) as server:
        run_id = server.summary("test").run_id
        store: SqlStore = server._coordinator._store
        for task in store.tasks(run_id):
            if task.state is TaskState.OPEN:
                store.end_task(task.id, TaskState.FAILED)
        with crowd(server.address, 2):
            eventually(lambda: len(server._coordinator._board.present()) == 2)
            eventually(lambda: store.rounds(run_id)[-1].state is RoundState.ASSIGNING)
            waiting = store.rounds(run_id)[-1]
            time.sleep(0.5)
            assert store.rounds(run_id)[-1] == waiting
            with Crowd([Device(server.address, name="installation-2", profile=profile(40))]):
                eventually(lambda: server.summary("test").round > waiting.number)
        server.stop_run("test", at_once=True)
        server.wait("test", timeout=SECONDS)


class FailingMethod(TrappedMethod):
    """A method whose aggregation fails, the first time or always."""

    def __init__(self, method, error, times):
        super().__init__(method, Trap("", 0))
        self.error = error
        self.times = times

    def aggregate(self, state, space, contributions):
        if self.times:
            self.times -= 1
            raise self.error
        return self.method.aggregate(state, space, contributions)


def failing_parts(error, times):
    def parts(config, blobs):
        made = open_tiny_parts(config, blobs)
        return dataclasses.replace(made, method=FailingMethod(made.method, error, times))

    return parts


def test_full_disk_makes_the_run_wait_and_changes_nothing(tmp_path):
    expected = undisturbed(tmp_path)
    parts = failing_parts(OSError(errno.ENOSPC, "No space left on device"), 1)
    with start_server(server_config(tmp_path / "runs"), open_parts=parts) as server:
        server.create_run(run_config(tmp_path))
        with crowd(server.address):
            assert server.wait("test", timeout=SECONDS).state is RunState.FINISHED

    assert final_adapters(tmp_path / "runs" / "test") == expected


def test_error_of_a_method_ends_the_run_with_its_cause(tmp_path):
    parts = failing_parts(ValueError("weights do not add up"), -1)
    with start_server(server_config(tmp_path / "runs"), open_parts=parts) as server:
        server.create_run(run_config(tmp_path))
        with crowd(server.address) as devices:
            summary = server.wait("test", timeout=SECONDS)
            devices.join()

    assert summary.state is RunState.FAILED
    assert summary.message == "ValueError: weights do not add up"
    report = json.loads((tmp_path / "runs" / "test" / "report.json").read_text())
    assert (report["state"], report["rounds"][0]["state"]) == ("failed", "abandoned")
    assert not any(ending.HasField("adapter") for ending in devices.endings.values())


def test_damaged_update_ends_the_run_instead_of_the_adapter(tmp_path):
    trap = Trap("aggregate", 0)
    config = server_config(tmp_path / "runs")
    trap.server = first = start_server(config, open_parts=trap.parts)
    first.create_run(run_config(tmp_path))
    with crowd(first.address):
        assert trap.sprung.wait(SECONDS)
    first.stop()
    store = SqlStore(config.database_url)
    digest = store.updates(store.run("test").id, 0)[0].digest
    store.close()
    path = config.private_folder / "updates" / digest
    path.write_bytes(path.read_bytes()[::-1])

    with start_server(config) as second:
        summary = second.wait("test", timeout=SECONDS)

    assert summary.state is RunState.FAILED
    assert digest in summary.message


def test_refused_device_is_considered_again_with_a_fresh_profile(server, devices, tmp_path):
    server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
    (device,) = devices(1, profile=profile(5))
    eventually(lambda: device.next_task(0.0).WhichOneof("outcome") == "refused")
    request = messages.NextTaskRequest(wait_seconds=5.0, profile=profile_to_message(profile(40)))

    answer = device.call("NextTask", request)

    assert answer.task.plan.facts.rank == 4
