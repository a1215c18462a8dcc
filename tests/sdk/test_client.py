# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.sdk.engines.tiny_package import (
    BIAS,
    HEAD,
    INPUTS,
    LABELS,
    A,
    B,
    TinyPackage,
    build_tiny_package,
    example_rows,
    put,
)
from tests.sdk.loopback import Loopback, drop, refuse

from lorikit.proto.manifest import BlobRef, dump
from lorikit.proto.plan import Operation, OptimizerConfig, Phase, Plan
from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Bundle, Tensors, pack, raw, unpack
from lorikit.proto.v1 import device_service_pb2 as pb
from lorikit.proto.wire import blob_to_message, plan_to_message
from lorikit.quantization import codec
from lorikit.sdk import (
    AdapterReady,
    Client,
    ClientConfig,
    ConnectionLostError,
    Disconnected,
    Downloaded,
    EngineUnavailableError,
    Event,
    Failed,
    IdentityError,
    Metrics,
    PackageError,
    Progress,
    RefusedError,
    RetryConfig,
    RoundDone,
    State,
    StateChanged,
    StorageFullError,
    StoreBusyError,
    TaskStarted,
    available_engines,
)
from lorikit.sdk._store import PendingUpdate, Store

pytest.importorskip("onnxruntime", reason="clients train on the onnx engine")

linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit is the Linux kernel's")

ROWS = example_rows(20)
CONFIG = ClientConfig(
    wait_seconds=0.05,
    call_seconds=10.0,
    retry=RetryConfig(first_seconds=0.01, max_seconds=0.02),
)
PHASE = Phase(
    train=(A, B, HEAD, BIAS),
    steps=12,
    batch_size=6,
    micro_batch=4,
    optimizer=OptimizerConfig(learning_rate=0.01),
)
PLAN = Plan(method="fedit", inputs=INPUTS, phases=(PHASE,), max_length=16, seed=11)
LONG = dataclasses.replace(PLAN, phases=(dataclasses.replace(PHASE, steps=200_000),))


class Federation(Loopback):
    """The loopback server with a real package, and words for what a run hands out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tiny: TinyPackage = build_tiny_package(folder)
        self.package = put(folder, dump(self.tiny.manifest))
        self.adapter = self.adapter_blob(self.tiny.adapter())

    def adapter_blob(self, tensors: Tensors) -> BlobRef:
        return put(self.folder, pack(Bundle({n: raw(v) for n, v in tensors.items()})))

    def offer_task(self, name: str = "task-1", plan: Plan = PLAN, **fields: object) -> None:
        message = pb.Task(
            task_id=name,
            run_id="run",
            round=1,
            lease_seconds=0.6,
            plan=plan_to_message(plan),
            package=blob_to_message(self.package),
            adapter=blob_to_message(self.adapter),
            kind="train",
            update_id="update-of-" + name,
        )
        for field, value in fields.items():
            if isinstance(value, BlobRef):
                getattr(message, field).CopyFrom(blob_to_message(value))
            else:
                setattr(message, field, value)
        self.offers.append(pb.NextTaskResponse(task=message))

    def offer_end(self, adapter: BlobRef | None = None) -> None:
        finished = pb.Finished(
            run_id="run",
            package=blob_to_message(self.package),
            adapter=blob_to_message(adapter or self.adapter),
            inputs=INPUTS,
            max_length=16,
        )
        self.offers.append(pb.NextTaskResponse(finished=finished))

    def update(self, name: str = "task-1") -> Tensors:
        tensors = unpack(self.updates["update-of-" + name]).tensors
        return {n: codec(each.codec).decode(each) for n, each in tensors.items()}


class Device:
    """A client on a store of its own, and what it said."""

    def __init__(self, server: Federation, store: Path) -> None:
        self.server, self.store = server, store
        self.events: list[Event] = []

    def client(
        self, then: Callable[[Client, Event], None] = lambda client, event: None, **options: object
    ) -> Client:
        def on_event(event: Event) -> None:
            self.events.append(event)
            then(client, event)

        arguments = {"config": CONFIG, "engine": "onnx", "threads": 1, "data": ROWS, **options}
        client = Client(
            self.server.address,
            store=self.store,
            insecure=True,
            speed_gflops=1.0,
            on_event=on_event,
            **arguments,  # type: ignore[arg-type]  # options by name
        )
        return client

    def run(
        self, then: Callable[[Client, Event], None] = lambda client, event: None, **options: object
    ) -> State:
        with self.client(then, **options) as client:
            return client.run()

    def seen(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Federation]:
    folder = tmp_path / "server"
    folder.mkdir()
    with Federation(folder) as server:
        yield server


@pytest.fixture
def device(server: Federation, tmp_path: Path) -> Device:
    return Device(server, tmp_path / "device")


@pytest.fixture
def undisturbed(server: Federation, tmp_path: Path) -> Tensors:
    """What the standard task yields when nothing goes wrong."""
    server.offer_task("calm")
    server.offer_end()
    Device(server, tmp_path / "calm").run()
    server.offers.clear()
    return server.update("calm")


def assert_same(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_device_takes_part_in_a_round_and_gets_the_final_adapter(
    server: Federation, device: Device
) -> None:
    server.offer_task()
    server.offer_end()

    state = device.run(device_class="phone", memory_limit="256MB")

    assert state is State.FINISHED
    assert server.profiles[0].device_class == "phone"
    assert server.profiles[0].memory_limit_bytes == 256_000_000
    assert [engine.name for engine in server.profiles[0].engines] == ["onnx"]
    moved = server.update()
    assert moved.keys() == {A, B, HEAD, BIAS}
    assert not np.array_equal(moved[A], server.tiny.adapter()[A])
    report = server.reports[0]
    assert (report.examples, report.dataset_size, report.steps) == (72, 20, 12)
    assert report.engine == "onnx"
    assert report.peak_memory_bytes > report.anonymous_memory_bytes > 0
    assert report.bytes_down > 0


def test_missing_engine_names_the_command_that_installs_it(device: Device) -> None:
    present = {engine.name for engine in available_engines()}
    missing = next(name for name in ("onnx-training", "onnx") if name not in present)

    with pytest.raises(EngineUnavailableError, match=rf'pip install "lorikit\[{missing}\]"'):
        device.run(engine=missing)


def test_events_tell_the_story_in_order(server: Federation, device: Device) -> None:
    server.offer_task()
    server.offer_end()

    device.run()

    states = [e.state for e in device.seen(StateChanged)]  # type: ignore[attr-defined]
    assert states == [
        State.CONNECTING,
        State.WAITING,
        State.DOWNLOADING,
        State.TRAINING,
        State.UPLOADING,
        State.WAITING,
        State.DOWNLOADING,
        State.FINISHED,
    ]
    assert [e.step for e in device.seen(Progress)] == list(range(1, 13))  # type: ignore[attr-defined]
    (started,) = device.seen(TaskStarted)
    (done,) = device.seen(RoundDone)
    assert isinstance(started, TaskStarted)
    assert isinstance(done, RoundDone)
    assert not started.resumed
    assert done.bytes_up == len(server.updates["update-of-task-1"])
    assert done.last_loss < done.first_loss
    assert device.names()[-2:] == ["AdapterReady", "StateChanged"]
    assert all(
        e.received_bytes <= e.total_bytes  # type: ignore[attr-defined]
        for e in device.seen(Downloaded)
    )


def test_package_is_downloaded_once(server: Federation, device: Device) -> None:
    server.offer_task("task-1")
    server.offer_task("task-2")
    server.offer_end()

    device.run()

    assert len(server.updates) == 2
    assert server.calls["DownloadBlob"] == 1 + 1 + len(server.tiny.manifest.blobs())


def test_prediction_needs_an_adapter(device: Device) -> None:
    with device.client() as client, pytest.raises(PackageError, match="no adapter yet"):
        client.predict(["w1"])


def test_final_adapter_predicts_also_off_line_after_a_restart(
    server: Federation, device: Device
) -> None:
    long = dataclasses.replace(PHASE, steps=60, optimizer=OptimizerConfig(learning_rate=0.05))
    server.offer_task(plan=dataclasses.replace(PLAN, phases=(long,)))
    server.offer_end()
    device.run()
    final = server.adapter_blob(server.update())
    server.offers.clear()
    server.offer_end(final)
    device.run()
    server.__exit__()

    with device.client() as client:
        answers = client.predict([row["text"] for row in ROWS])
        metrics = client.evaluate(ROWS)

    right = sum(label == row["label"] for (label, _), row in zip(answers, ROWS, strict=True))
    assert right == 20
    assert metrics["accuracy"] == 1.0
    assert metrics["examples"] == 20.0
    assert 0 < metrics["loss"] < 0.7
    assert all(label in LABELS and 1 / 3 < chance <= 1 for label, chance in answers)


def test_probabilities_are_those_of_the_reference(server: Federation, device: Device) -> None:
    server.offer_end()
    device.run()

    with device.client() as client:
        ((label, chance),) = client.predict(["w3 w20"])

    tokens = {"input_ids": np.array([[5, 22]]), "attention_mask": np.array([[1, 1]])}
    batch = dataclasses.replace(server.tiny.batch((2,)), inputs=tokens)
    adapter = server.tiny.adapter()
    logits = server.tiny.features(adapter, batch) @ adapter[HEAD].T + adapter[BIAS]
    chances = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert label == LABELS[int(chances.argmax())]
    assert chance == pytest.approx(chances.max(), rel=1e-5)


def test_stopped_client_goes_on_within_the_task(
    server: Federation, device: Device, undisturbed: Tensors
) -> None:
    server.offer_task()

    def stop_at_5(client: Client, event: Event) -> None:
        if isinstance(event, Progress) and event.step == 5:
            client.stop()

    assert device.run(stop_at_5) is State.STOPPED
    device.events.clear()
    server.offer_end()
    device.run()

    (started,) = device.seen(TaskStarted)
    assert isinstance(started, TaskStarted)
    assert started.resumed
    assert [e.step for e in device.seen(Progress)] == list(range(6, 13))  # type: ignore[attr-defined]
    assert_same(server.update(), undisturbed)


def test_finished_update_is_sent_without_training_again(
    server: Federation, device: Device, undisturbed: Tensors
) -> None:
    server.offer_task()
    server.faults["UploadUpdate"].extend([drop()] * 100)

    def stop_when_lost(client: Client, event: Event) -> None:
        if isinstance(event, Disconnected):
            client.stop()

    assert device.run(stop_when_lost) is State.STOPPED
    assert len(device.seen(Progress)) == 12
    device.events.clear()
    server.faults.clear()
    server.offer_end()
    device.run()

    assert device.seen(Progress) == []
    assert_same(server.update(), undisturbed)
    assert server.reports[-1].examples == 72


def test_upload_goes_on_where_it_broke(
    server: Federation, device: Device, undisturbed: Tensors
) -> None:
    server.offer_task()
    server.offer_end()
    server.keep_upload_bytes = 100
    server.offsets.clear()

    device.run()

    assert server.offsets[-2:] == [0, 100]
    assert_same(server.update(), undisturbed)


def test_update_that_the_server_has_is_not_sent_again(server: Federation, device: Device) -> None:
    server.offer_task()
    server.updates["update-of-task-1"] = b"accepted before"
    rehanded = threading.Event()

    def stop_after_round(client: Client, event: Event) -> None:
        if isinstance(event, RoundDone):
            rehanded.set()
            client.stop()

    device.run(stop_after_round)

    assert rehanded.is_set()
    assert server.calls["UploadUpdate"] == 0


@pytest.mark.parametrize("call", ["Enrol", "NextTask", "DownloadBlob", "UploadStatus"])
def test_lost_connections_are_waited_out(
    server: Federation, device: Device, call: str, undisturbed: Tensors
) -> None:
    server.offer_task()
    server.offer_end()
    server.faults[call].extend([drop(), refuse(ErrorCode.SERVER_BUSY), drop()])

    assert device.run() is State.FINISHED

    attempts = [e.attempt for e in device.seen(Disconnected)]  # type: ignore[attr-defined]
    assert attempts == [1, 2, 3]
    assert_same(server.update(), undisturbed)


def test_client_gives_up_where_attempts_are_bounded(server: Federation, device: Device) -> None:
    server.faults["Enrol"].extend([drop()] * 100)
    retry = dataclasses.replace(CONFIG.retry, max_attempts=3)

    with pytest.raises(ConnectionLostError):
        device.run(config=dataclasses.replace(CONFIG, retry=retry))

    assert server.calls["Enrol"] == 3
    assert device.events[-1] == StateChanged(state=State.FAILED)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda message: None,
        lambda message: pb.DownloadBlobResponse(
            offset=message.offset,
            data=bytes(len(message.data)),
            chunk_digest=message.chunk_digest,
            total_size=message.total_size,
        ),
    ],
    ids=["truncated", "corrupt"],
)
def test_bad_streams_are_fetched_again_from_where_they_were_good(
    server: Federation,
    device: Device,
    spoil: Callable[[pb.DownloadBlobResponse], pb.DownloadBlobResponse | None],
    undisturbed: Tensors,
) -> None:
    server.offer_task()
    server.offer_end()
    server.offsets.clear()
    server.spoil.append(spoil)

    assert device.run() is State.FINISHED

    assert server.offsets[:2] == [0, 1000]
    assert_same(server.update(), undisturbed)


def test_blob_that_stays_damaged_fails_the_task_alone(server: Federation, device: Device) -> None:
    damaged = BlobRef(digest="0" * 64, size=5)
    (server.folder / damaged.digest).write_bytes(b"wrong")
    server.offer_task("bad", adapter=damaged)
    server.offer_task("good")
    server.offer_end()

    assert device.run() is State.FINISHED

    assert [(f.task_id, f.error) for f in server.failures] == [("bad", "DamagedBlobError")]
    assert "update-of-good" in server.updates


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (dataclasses.replace(PLAN, operations=(Operation(name="mine_bitcoin"),)),
         "PlanRefusedError"),
        (dataclasses.replace(PLAN, codec="zip"), "PlanRefusedError"),
        (dataclasses.replace(PLAN, phases=(dataclasses.replace(
            PHASE, steps=200, optimizer=OptimizerConfig(name="sgd", learning_rate=1e30)),)),
         "NonFiniteError"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow is what the last case is about
def test_task_that_cannot_be_done_is_reported_and_the_next_one_is_done(
    server: Federation, device: Device, plan: Plan, error: str
) -> None:
    server.offer_task("bad", plan)
    server.offer_task("good")
    server.offer_end()

    assert device.run() is State.FINISHED

    assert [(f.task_id, f.error) for f in server.failures] == [("bad", error)]
    (failed,) = device.seen(Failed)
    assert isinstance(failed, Failed)
    assert failed.error == error
    assert "update-of-good" in server.updates


def test_adapter_of_another_model_is_refused(server: Federation, device: Device) -> None:
    other = {"other.weight": np.ones((2, 2), np.float32)}
    server.offer_task(adapter=server.adapter_blob(other))
    server.offer_end()

    device.run()

    assert server.failures[0].error == "ForeignAdapterError"
    assert "has a tensor" in server.failures[0].message


def test_adapter_with_nan_is_refused(server: Federation, device: Device) -> None:
    tensors = server.tiny.adapter()
    tensors[B][0, 0] = np.nan
    server.offer_task(adapter=server.adapter_blob(tensors))
    server.offer_end()

    device.run()

    assert server.failures[0].error == "PackageError"
    assert B in server.failures[0].message


def test_rows_that_do_not_fit_are_told_to_the_app_but_not_to_the_server(
    server: Federation, device: Device
) -> None:
    server.offer_task()
    server.offer_end()

    device.run(data=[{"text": "my secret diary", "label": "my secret label"}])

    (failed,) = device.seen(Failed)
    assert isinstance(failed, Failed)
    assert "my secret label" in failed.message
    assert server.failures[0].error == "DataError"
    assert "secret" not in server.failures[0].message


def test_full_store_fails_the_task_with_its_own_error(server: Federation, device: Device) -> None:
    server.offer_task()
    server.offers.append(pb.NextTaskResponse(finished=pb.Finished(run_id="run")))

    state = device.run(config=dataclasses.replace(CONFIG, storage_limit_bytes=2000))

    assert state is State.FINISHED
    assert server.failures[0].error == "StorageFullError"
    assert "raise storage_limit_bytes" in server.failures[0].message


def test_full_disk_at_the_end_of_training_does_not_cost_the_update(
    server: Federation, device: Device, undisturbed: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: Store, update: PendingUpdate) -> None:
        raise StorageFullError("no room")

    monkeypatch.setattr(Store, "save_update", full)
    server.offer_task()
    server.offer_end()

    assert device.run() is State.FINISHED

    assert_same(server.update(), undisturbed)
    assert list((device.store / "journal").iterdir()) == []


def test_refusal_ends_the_run_with_reason_and_remedy(server: Federation, device: Device) -> None:
    refusal = pb.Refusal(reason="Needs 300 MB.", remedy="Allow 44 MB more.")
    server.offers.append(pb.NextTaskResponse(refused=refusal))

    with pytest.raises(RefusedError) as caught:
        device.run()

    assert (caught.value.reason, caught.value.remedy) == ("Needs 300 MB.", "Allow 44 MB more.")
    assert "Refused" in device.names()


def test_client_comes_back_after_a_retry_window(server: Federation, device: Device) -> None:
    wait = pb.RetryWindow(min_seconds=0.01, max_seconds=0.02)
    server.offers.extend([pb.NextTaskResponse(wait=wait)] * 3)
    server.offer_end()

    assert device.run() is State.FINISHED

    assert server.calls["NextTask"] == 4


def test_cancelled_task_is_dropped_and_the_next_one_is_done(
    server: Federation, device: Device
) -> None:
    server.offer_task("long", LONG)
    server.offer_task("short")
    server.offer_end()

    def cancel_early(client: Client, event: Event) -> None:
        if isinstance(event, Progress) and event.task_id == "long" and event.step == 3:
            client.cancel()

    assert device.run(cancel_early) is State.FINISHED

    assert [(f.task_id, f.error) for f in server.failures] == [("long", "CancelledError")]
    assert list(server.updates) == ["update-of-short"]


def test_void_task_is_dropped_without_a_report(server: Federation, device: Device) -> None:
    server.offer_task("long", LONG)

    def void_at_3(client: Client, event: Event) -> None:
        if isinstance(event, Progress) and event.step == 3:
            server.go_on = False
        if isinstance(event, Failed):
            server.offers.clear()
            server.offer_end()

    assert device.run(void_at_3) is State.FINISHED

    (failed,) = device.seen(Failed)
    assert isinstance(failed, Failed)
    assert failed.error == "RoundClosedError"
    assert server.failures == []
    assert server.beats[-1].state == "training"
    assert server.beats[-1].steps == 200_000


def test_round_that_closed_before_the_upload_costs_the_task_alone(
    server: Federation, device: Device
) -> None:
    server.offer_task("late")
    server.faults["UploadStatus"].append(refuse(ErrorCode.ROUND_CLOSED))

    def next_task(client: Client, event: Event) -> None:
        if isinstance(event, Failed):
            server.offers.clear()
            server.offer_task("next")
            server.offer_end()

    assert device.run(next_task) is State.FINISHED

    assert list(server.updates) == ["update-of-next"]
    assert server.failures == []


def test_evaluation_task_reports_what_it_measured(server: Federation, device: Device) -> None:
    server.offer_task(kind="evaluate")
    server.offer_end()

    device.run()

    (report,) = server.evaluations
    (event,) = device.seen(Metrics)
    assert isinstance(event, Metrics)
    assert report.examples == 20
    assert dict(report.metrics) == pytest.approx(dict(event.metrics))
    assert 0 <= report.metrics["accuracy"] <= 1
    assert report.metrics["loss"] > 0
    assert server.updates == {}


def test_forgotten_device_enrols_again_and_keeps_its_work(
    server: Federation, device: Device, undisturbed: Tensors
) -> None:
    server.offer_task()
    server.offer_end()
    enrolled = server.calls["Enrol"]

    def forget(client: Client, event: Event) -> None:
        if event == StateChanged(state=State.UPLOADING):
            server.token = "another secret"

    assert device.run(forget) is State.FINISHED

    assert server.calls["Enrol"] == enrolled + 2
    assert len(device.seen(Progress)) == 12
    assert_same(server.update(), undisturbed)


def test_device_that_may_not_enrol_ends_with_an_identity_error(
    server: Federation, device: Device
) -> None:
    server.faults["Enrol"].append(refuse(ErrorCode.ENROLMENT_REFUSED))

    with pytest.raises(IdentityError, match="enrolment token"):
        device.run()


def test_identity_is_kept_over_restarts(server: Federation, device: Device) -> None:
    server.offer_end()

    device.run()
    device.run()

    assert server.calls["Enrol"] == 1


def test_background_client_tells_its_events_and_its_end(server: Federation, device: Device) -> None:
    server.offer_task()
    server.offer_end()

    with device.client() as client:
        events = client.events()
        client.start()
        kinds = [type(event) for event in events]
        assert client.wait(10) is State.FINISHED

    assert kinds.count(Progress) == 12
    assert AdapterReady in kinds


def test_background_failure_is_raised_to_whoever_waits(server: Federation, device: Device) -> None:
    server.offers.append(pb.NextTaskResponse(refused=pb.Refusal(reason="No.", remedy="")))

    with device.client() as client:
        client.start()
        with pytest.raises(RefusedError):
            client.wait(10)
        assert client.state is State.FAILED


def test_stop_ends_a_client_that_waits_for_work(server: Federation, device: Device) -> None:
    waiting, release = threading.Event(), threading.Event()
    server.faults["NextTask"].append(lambda context: (waiting.set(), release.wait(20)))  # type: ignore[arg-type]
    config = dataclasses.replace(CONFIG, wait_seconds=60.0)

    with device.client(config=config) as client:
        client.start()
        assert waiting.wait(10)
        started = time.monotonic()
        client.stop()
        assert time.monotonic() - started < 5
        assert client.state is State.STOPPED
    release.set()


def test_stopped_client_can_start_again(server: Federation, device: Device) -> None:
    server.offer_task("long", LONG)

    with device.client() as client:
        events = client.events()
        client.start()
        next(event for event in events if isinstance(event, Progress))
        client.stop()
        server.offers.clear()
        server.offer_end()

        assert client.run() is State.FINISHED


def test_client_runs_once_at_a_time(server: Federation, device: Device) -> None:
    server.offer_task("long", LONG)

    with device.client() as client:
        client.start()
        with pytest.raises(RuntimeError, match="running already"):
            client.run()


def test_prediction_works_while_training(server: Federation, device: Device) -> None:
    server.offer_task("long", LONG)

    with device.client() as client:
        events = client.events()
        client.start()
        next(event for event in events if isinstance(event, Progress))

        assert len(client.predict(["w1 w2", "w30"])) == 2
        assert client.state is State.TRAINING


def test_client_stops_after_the_rounds_it_was_asked_for(server: Federation, device: Device) -> None:
    for number in range(3):
        server.offer_task(f"task-{number}")

    with device.client() as client:
        assert client.run(max_rounds=2) is State.STOPPED

    assert len(server.updates) == 2


def test_second_client_on_the_store_is_refused(device: Device) -> None:
    with device.client(), pytest.raises(StoreBusyError):
        device.client()


@pytest.mark.parametrize("memory_limit", ["a lot", 0])
def test_memory_limit_is_checked_before_anything_is_sent(
    device: Device, memory_limit: object
) -> None:
    with pytest.raises(ValueError, match="size"):
        device.client(memory_limit=memory_limit)


class Process:
    """A device as a real process."""

    def __init__(self, server: Federation, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "lorikit.sdk", "--server", server.address),
                *("--data", str(data), "--store", str(folder / "store"), "--insecure"),
                *("--engine", "onnx", "--threads", "1", "--speed-gflops", "1"),
                *("--format", "json", *options),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )

    def events(self) -> Iterator[dict[str, object]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until(self, name: str, step: int = 0) -> dict[str, object]:
        return next(e for e in self.events() if e["event"] == name and e.get("step", 0) >= step)  # type: ignore[operator]

    def end(self) -> int:
        assert self.process.stdout is not None
        list(self.process.stdout)
        self.process.stdout.close()
        return self.process.wait(30)


SLOW = dataclasses.replace(PLAN, phases=(dataclasses.replace(PHASE, steps=800),))


@pytest.mark.slow
def test_killed_process_goes_on_within_the_task(server: Federation, tmp_path: Path) -> None:
    server.offer_task("calm", SLOW)
    server.offer_end()
    calm = Process(server, tmp_path / "calm")
    assert calm.end() == 0
    server.offers.clear()
    server.offer_task("task-1", SLOW)

    killed = Process(server, tmp_path / "device")
    killed.until("Progress", step=100)
    killed.process.send_signal(signal.SIGKILL)
    assert killed.end() == -signal.SIGKILL
    server.offer_end()
    resumed = Process(server, tmp_path / "device")
    started = resumed.until("TaskStarted")
    first = resumed.until("Progress")

    assert resumed.end() == 0
    assert started["resumed"]
    assert first["step"] >= 90  # type: ignore[operator]  # the journal is at most 10 steps old
    assert_same(server.update("task-1"), server.update("calm"))
    assert len(server.reports) == 2


class Gate:
    """A fault that holds a call up until the test lets it go."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, context: grpc.ServicerContext) -> None:
        self.reached.set()
        self.opened.wait(60)


@pytest.mark.slow
def test_process_killed_while_downloading_goes_on_from_there(
    server: Federation, tmp_path: Path, undisturbed: Tensors
) -> None:
    gate = Gate()

    def hold(message: pb.DownloadBlobResponse) -> None:
        gate(None)  # type: ignore[arg-type]  # a stream has no use for the context

    server.offer_task()
    server.spoil.append(hold)
    killed = Process(server, tmp_path / "device")
    assert gate.reached.wait(60)
    killed.until("Downloaded")
    killed.process.send_signal(signal.SIGKILL)
    killed.end()
    gate.opened.set()
    server.offers.append(pb.NextTaskResponse(finished=pb.Finished(run_id="run")))
    server.offsets.clear()

    assert Process(server, tmp_path / "device").end() == 0

    assert server.offsets[0] == 1000
    assert_same(server.update(), undisturbed)


@pytest.mark.slow
def test_process_killed_while_uploading_sends_without_training_again(
    server: Federation, tmp_path: Path, undisturbed: Tensors
) -> None:
    gate = Gate()
    server.offer_task()
    server.faults["UploadUpdate"].append(gate)
    killed = Process(server, tmp_path / "device")
    assert gate.reached.wait(60)
    killed.process.send_signal(signal.SIGKILL)
    killed.end()
    gate.opened.set()
    server.offer_end()

    resumed = Process(server, tmp_path / "device")
    names = [event["event"] for event in resumed.events()]

    assert resumed.end() == 0
    assert "RoundDone" in names
    assert "Progress" not in names
    assert_same(server.update(), undisturbed)
    assert len(server.reports) == 2


@pytest.mark.slow
def test_process_ends_cleanly_on_sigterm(server: Federation, tmp_path: Path) -> None:
    server.offer_task("long", LONG)
    process = Process(server, tmp_path / "device")
    process.until("Progress")

    process.process.send_signal(signal.SIGTERM)

    assert process.end() == 143
    assert server.failures == []


@pytest.mark.slow
@linux
def test_memory_limit_is_enforced_on_the_process(server: Federation, tmp_path: Path) -> None:
    server.offer_task()
    server.offer_end()

    assert Process(server, tmp_path / "roomy", "--memory-limit", "256MB").end() == 0
    assert server.profiles[-1].memory_limit_bytes == 256_000_000
    peak = server.reports[-1].peak_memory_bytes
    assert peak < 256_000_000
    server.offers.clear()
    server.offer_task("task-2")
    server.offer_end()
    limit = int(0.93 * peak)
    assert Process(server, tmp_path / "tight", "--memory-limit", str(limit)).end() == 10


@linux
def test_limit_below_the_programs_own_needs_is_refused_at_once(
    server: Federation, tmp_path: Path
) -> None:
    process = Process(server, tmp_path / "device", "--memory-limit", "30MB")

    error = process.until("Error")

    assert error["error"] == "OutOfMemoryError"
    assert "allow at least" in str(error["message"])
    assert process.end() == 10


@pytest.mark.slow
def test_exit_codes_name_the_cause(server: Federation, tmp_path: Path) -> None:
    server.offers.append(pb.NextTaskResponse(refused=pb.Refusal(reason="No.", remedy="")))
    assert Process(server, tmp_path / "refused").end() == 3

    server.faults["Enrol"].append(drop(grpc.StatusCode.UNIMPLEMENTED))
    assert Process(server, tmp_path / "old").end() == 5

    broken = tmp_path / "broken.jsonl"
    broken.write_text("not json\n")
    assert Process(server, tmp_path / "data", "--data", str(broken)).end() == 8
