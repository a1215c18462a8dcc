# SPDX-License-Identifier: Apache-2.0
"""The device service over real gRPC: what each call refuses, and that nothing is lost by it."""

from __future__ import annotations

import hashlib
import threading

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.server.federation import (
    Device,
    error_code,
    eventually,
    profile,
    run_config,
    server_config,
    start_server,
    upload_requests,
)

from lorikit.proto.limits import CHUNK_BYTES, MAX_CHUNK_BYTES, PROTOCOL_METADATA, RETRY_METADATA
from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Bundle, pack, raw, unpack
from lorikit.proto.v1 import device_service_pb2 as messages
from lorikit.server.config import LimitsConfig
from lorikit.server.states import RunState


@pytest.fixture
def server(tmp_path):
    with start_server(server_config(tmp_path / "runs")) as server:
        yield server


@pytest.fixture
def make_device(server):
    made = []

    def make(name="installation-0", *, enrol=True, **changes):
        device = Device(server.address, name=name, **changes)
        made.append(device)
        return device.enrol() if enrol else device

    yield make
    for device in made:
        device.close()


@pytest.fixture
def working(server, make_device, tmp_path):
    """A device, its open task, and the update it could send."""
    server.create_run(run_config(tmp_path, rounds=1, min_devices=1, max_attempts=2))
    device = make_device()
    task = device.task()
    return device, task, device.update(task)


def refused(call, *args, **kwargs) -> ErrorCode:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    return error_code(caught.value)


def accepted(call, *args) -> bool:
    try:
        call(*args)
    except grpc.RpcError:
        return False
    return True


def send(device, task, data, **changes):
    return device.call("UploadUpdate", upload_requests(task, data, **changes))


def changed(data, change):
    """The update with its tensors changed."""
    bundle = unpack(data)
    tensors = {n: np.array(e.parts["values"], np.float32) for n, e in bundle.tensors.items()}
    change(tensors)
    return pack(Bundle({n: raw(t) for n, t in tensors.items()}, dict(bundle.scalars)))


@pytest.mark.parametrize("protocol", ["0", "2", "", "one"])
def test_other_protocol_is_refused_before_anything_else(make_device, protocol):
    device = make_device(enrol=False, protocol=protocol)

    assert refused(device.enrol) is ErrorCode.PROTOCOL_UNSUPPORTED


def test_protocol_is_checked_before_the_message_is_parsed(server):
    with grpc.insecure_channel(server.address) as channel:
        for data, version in ((b"\xff\xff not a message", "9"), (b"", "9")):
            call = channel.unary_unary("/lorikit.proto.v1.DeviceService/Enrol")
            metadata = [(PROTOCOL_METADATA, version)]
            assert refused(call, data, metadata=metadata) is ErrorCode.PROTOCOL_UNSUPPORTED


def test_unknown_device_must_enrol(make_device):
    device = make_device(enrol=False)
    assert refused(device.next_task, 0.0) is ErrorCode.IDENTITY_REQUIRED

    device.device_id, device.token = "0" * 32, "guess"
    assert refused(device.next_task, 0.0) is ErrorCode.IDENTITY_REQUIRED


def test_wrong_token_is_refused(make_device):
    device = make_device()
    device.token += "x"

    assert refused(device.next_task, 0.0) is ErrorCode.IDENTITY_REQUIRED


def test_old_token_is_refused_after_enrolling_again(make_device):
    device, again = make_device(), make_device()

    assert device.device_id == again.device_id
    assert refused(device.next_task, 0.0) is ErrorCode.IDENTITY_REQUIRED
    assert again.next_task(0.0).WhichOneof("outcome") == "wait"


def test_error_says_when_to_come_back(tmp_path):
    limits = LimitsConfig(max_devices=1, busy_retry_seconds=3)
    with start_server(server_config(tmp_path / "runs", limits=limits)) as server:
        first = Device(server.address, "installation-0").enrol()
        second = Device(server.address, "installation-1")
        with pytest.raises(grpc.RpcError) as caught:
            second.enrol()
        first.close(), second.close()

    assert error_code(caught.value) is ErrorCode.SERVER_BUSY
    assert dict(caught.value.trailing_metadata())[RETRY_METADATA] == "3"


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_limit_bytes": 0},
        {"cores": 0},
        {"speed_gflops": float("nan")},
        {"platform": "x" * 201},
        {"codecs": ("fp32",) * 65},
        {"device_class": "phone\x1b[2J"},
        {"operations": ("a\nb",)},
    ],
)
def test_profile_out_of_range_is_refused(make_device, changes):
    device = make_device(enrol=False, profile=profile(**changes))

    assert refused(device.enrol) is ErrorCode.REQUEST_INVALID


@pytest.mark.parametrize(
    "report",
    [
        {"engine": "x" * 201},
        {"engine": "onnx\n2026 INFO all is well"},
        {"training_seconds": -1.0},
        {"accuracy": -0.5},
        {"examples": 1 << 60},
    ],
)
def test_report_out_of_range_is_refused(working, report):
    device, task, data = working
    requests = list(upload_requests(task, data))
    for name, value in report.items():
        setattr(requests[0].header.report, name, value)

    assert refused(device.call, "UploadUpdate", iter(requests)) is ErrorCode.REQUEST_INVALID
    assert not device.upload(task, data).duplicate


def test_message_that_cannot_be_parsed_is_refused(make_device):
    device = make_device()
    for name in ("NextTask", "UploadStatus", "Heartbeat", "ReportFailure", "Enrol"):
        call = device.channel.unary_unary(f"/lorikit.proto.v1.DeviceService/{name}")
        assert refused(call, b"\xff\xff", metadata=device.metadata) is ErrorCode.REQUEST_INVALID


def test_failure_with_control_characters_is_told_in_one_plain_line(server, working):
    device, task, _ = working
    request = messages.ReportFailureRequest(
        task_id=task.task_id, error="Out\x1b[2JOfMemory", message="a\nb" * 1000
    )
    device.call("ReportFailure", request)

    store = server._coordinator._store
    told = store.task(task.task_id)
    assert told.error.isprintable()
    assert told.message.isprintable()
    assert len(told.message) == 500


def test_short_installation_id_is_refused(make_device):
    assert refused(make_device(name="me", enrol=False).enrol) is ErrorCode.REQUEST_INVALID


def test_device_without_work_is_told_when_to_come_back(make_device):
    answer = make_device().next_task(0.0)

    assert 0 < answer.wait.min_seconds <= answer.wait.max_seconds


def test_waiting_device_gets_its_task_at_once(server, make_device, tmp_path):
    device = make_device()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(device.task()))
    waiting.start()
    server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
    waiting.join()

    assert answers[0].round == 0
    assert answers[0].plan.facts.rank == 4


def test_task_of_another_device_is_unknown(working, make_device):
    _, task, data = working
    other = make_device("installation-other")

    assert refused(other.heartbeat, task) is ErrorCode.TASK_UNKNOWN
    assert refused(other.fail, task) is ErrorCode.TASK_UNKNOWN
    assert refused(other.upload, task, data) is ErrorCode.TASK_UNKNOWN


def test_heartbeat_keeps_the_lease(working):
    device, task, _ = working

    answer = device.heartbeat(task)

    assert answer.go_on
    assert answer.lease_seconds == 5.0


def test_progress_is_shown_to_the_operator(server, working):
    device, task, _ = working
    device.heartbeat(task)
    report = server._call(server._coordinator.runs.report("test"))

    assert report["working"] == [
        {"device": device.device_id, "round": 0, "state": "training", "step": 1, "steps": 3}
    ]


def test_blob_arrives_in_checked_chunks(server, make_device):
    data = bytes(range(256)) * (CHUNK_BYTES // 256) + b"end"
    ref = server._coordinator._blobs.put(data)
    device = make_device()
    request = messages.DownloadBlobRequest(digest=ref.digest)
    chunks = list(device.call("DownloadBlob", request))

    assert b"".join(chunk.data for chunk in chunks) == data
    assert [chunk.offset for chunk in chunks] == [0, CHUNK_BYTES]
    assert {chunk.total_size for chunk in chunks} == {len(data)}
    for chunk in chunks:
        assert hashlib.sha256(chunk.data).digest() == chunk.chunk_digest


def test_download_goes_on_from_an_offset(server, make_device):
    ref = server._coordinator._blobs.put(b"0123456789")
    device = make_device()

    assert device.download(ref, offset=4) == b"456789"
    assert device.download(ref, offset=10) == b""
    assert refused(device.download, ref, offset=11) is ErrorCode.OFFSET_INVALID


@pytest.mark.parametrize("digest", ["0" * 64, "../lorikit.sqlite", ""])
def test_unknown_blob_is_refused(make_device, digest):
    ref = messages.BlobRef(digest=digest)

    assert refused(make_device().download, ref) is ErrorCode.BLOB_UNKNOWN


def test_updates_of_others_cannot_be_downloaded(server, make_device):
    ref = server._coordinator._kept.put(b"somebody's update")

    assert refused(make_device().download, ref) is ErrorCode.BLOB_UNKNOWN


def test_downloads_beyond_the_limit_are_told_to_wait(tmp_path):
    limits = LimitsConfig(max_downloads=1, busy_retry_seconds=2)
    with start_server(server_config(tmp_path / "runs", limits=limits)) as server:
        ref = server._coordinator._blobs.put(bytes(40 * CHUNK_BYTES))
        device = Device(server.address).enrol()
        request = messages.DownloadBlobRequest(digest=ref.digest)
        first = device.call("DownloadBlob", request)
        next(first)
        assert refused(device.download, ref) is ErrorCode.SERVER_BUSY
        first.cancel()
        eventually(lambda: accepted(device.download, ref))
        device.close()


def test_update_gets_a_receipt_and_a_second_sending_is_a_duplicate(server, working):
    device, task, data = working
    first = device.upload(task, data)
    again = device.upload(task, data)

    assert (first.update_id, first.duplicate) == (task.update_id, False)
    assert (again.update_id, again.duplicate) == (task.update_id, True)
    assert device.upload_status(task, data).accepted
    assert server.wait("test", timeout=20).state is RunState.FINISHED


def test_truncated_upload_goes_on_where_it_stopped(working):
    device, task, data = working
    assert refused(device.upload, task, data, stop=600) is ErrorCode.UPDATE_CORRUPT

    status = device.upload_status(task, data)
    assert (status.offset, status.accepted) == (600, False)
    assert refused(device.upload, task, data) is ErrorCode.OFFSET_INVALID
    assert not device.upload(task, data, offset=600).duplicate


def test_bytes_of_another_digest_do_not_count(working):
    device, task, data = working
    refused(device.upload, task, data, stop=600)

    assert device.upload_status(task, b"something else").offset == 0


def test_whole_update_without_its_receipt_is_not_sent_again(server, working):
    device, task, data = working
    server._coordinator._kept.put(data)

    assert device.upload_status(task, data).offset == len(data)
    assert not device.upload(task, data, offset=len(data)).duplicate


def test_corrupt_chunk_is_refused_and_the_rest_kept(working):
    device, task, data = working
    requests = list(upload_requests(task, data))
    requests[3].chunk.data = b"x" + requests[3].chunk.data[1:]

    assert refused(device.call, "UploadUpdate", iter(requests)) is ErrorCode.UPDATE_CORRUPT
    assert device.upload_status(task, data).offset == 600
    assert not device.upload(task, data, offset=600).duplicate


def test_chunks_that_do_not_make_the_digest_start_again(working):
    device, task, data = working
    other = bytes(len(data))
    digest = hashlib.sha256(data).hexdigest()

    assert refused(send, device, task, other, digest=digest) is ErrorCode.UPDATE_CORRUPT
    assert device.upload_status(task, data).offset == 0
    assert not device.upload(task, data).duplicate


def test_declared_size_is_bounded_before_anything_is_stored(server, working):
    device, task, data = working

    assert refused(send, device, task, data, total_size=10 << 30) is ErrorCode.UPDATE_TOO_LARGE
    assert list((server.config.private_folder / "uploads").iterdir()) == []


def test_more_than_the_declared_size_is_refused(working):
    device, task, data = working

    assert refused(send, device, task, data, total_size=700) is ErrorCode.UPDATE_TOO_LARGE


def test_chunk_that_is_too_large_is_refused(working):
    device, task, _ = working
    data = bytes(MAX_CHUNK_BYTES + 1)

    code = refused(send, device, task, data, chunk_bytes=len(data), total_size=1000)

    assert code is ErrorCode.REQUEST_INVALID


def test_upload_without_a_header_is_refused(working):
    device, task, data = working
    requests = list(upload_requests(task, data))[1:]

    assert refused(device.call, "UploadUpdate", iter(requests)) is ErrorCode.REQUEST_INVALID
    assert refused(device.call, "UploadUpdate", iter(())) is ErrorCode.REQUEST_INVALID


def test_digest_that_is_none_is_refused(working):
    device, task, data = working

    assert refused(send, device, task, data, digest="../../x") is ErrorCode.REQUEST_INVALID


def test_upload_for_another_update_is_refused(working):
    device, task, data = working
    task.update_id = "0" * 32

    assert refused(device.upload, task, data) is ErrorCode.TASK_UNKNOWN


def test_uploads_beyond_the_limit_are_told_to_wait(tmp_path):
    limits = LimitsConfig(max_uploads=1)
    with start_server(server_config(tmp_path / "runs", limits=limits)) as server:
        server.create_run(run_config(tmp_path, rounds=1, min_devices=2, min_updates=1))
        devices = [Device(server.address, f"installation-{n}").enrol() for n in range(2)]
        for device in devices:
            device.next_task(0.0)
        tasks = [device.task() for device in devices]
        updates = [d.update(t) for d, t in zip(devices, tasks, strict=True)]
        go_on = threading.Event()

        def slowly():
            requests = list(upload_requests(tasks[0], updates[0]))
            yield from requests[:2]
            go_on.wait(10)
            yield from requests[2:]

        slow = threading.Thread(target=devices[0].call, args=("UploadUpdate", slowly()))
        slow.start()
        eventually(lambda: devices[0].upload_status(tasks[0], updates[0]).offset == 300)
        code = refused(devices[1].upload, tasks[1], updates[1])
        go_on.set()
        slow.join()
        assert not devices[1].upload(tasks[1], updates[1]).duplicate
        for device in devices:
            device.close()

    assert code is ErrorCode.SERVER_BUSY


def test_second_stream_takes_over_from_a_dead_connection(working):
    device, task, data = working
    go_on = threading.Event()
    codes = []

    def slowly():
        requests = list(upload_requests(task, data))
        yield from requests[:2]
        go_on.wait(10)
        yield from requests[2:]

    first = threading.Thread(
        target=lambda: codes.append(refused(device.call, "UploadUpdate", slowly()))
    )
    first.start()
    eventually(lambda: device.upload_status(task, data).offset == 300)
    second = device.upload(task, data, offset=300)
    go_on.set()
    first.join()

    assert not second.duplicate
    assert codes == [ErrorCode.OFFSET_INVALID]


HEAD = "classifier.weight"
LORA_A = "encoder.layer.0.query.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(HEAD), HEAD),
        (lambda t: t.update(extra=t[HEAD]), "extra"),
        (lambda t: t.update({HEAD: t[HEAD].T}), HEAD),
        (lambda t: t.update({LORA_A: np.ones((9, 6), "f4")}), LORA_A),
        (lambda t: t.update({LORA_A: np.ones((0, 6), "f4")}), LORA_A),
        (lambda t: t.update({LORA_A: t[LORA_A][:2]}), LORA_A),
        (lambda t: t[HEAD].fill(np.nan), HEAD),
        (lambda t: t[HEAD].fill(np.inf), HEAD),
        (lambda t: t[HEAD].fill(1e6), "joint norm"),
    ],
    ids=["missing", "extra", "shape", "rank", "empty", "smaller", "nan", "inf", "norm"],
)
def test_update_that_breaks_a_rule_is_refused_by_name(working, change, named):
    device, task, data = working

    with pytest.raises(grpc.RpcError) as caught:
        device.upload(task, changed(data, change))

    assert error_code(caught.value) is ErrorCode.UPDATE_INVALID
    assert named in caught.value.details()
    assert not device.heartbeat(task).go_on


def pruned(tensors):
    for name, values in tensors.items():
        if "lora_A" in name:
            tensors[name] = values[:2]
        if "lora_B" in name:
            tensors[name] = values[:, :2]


@pytest.fixture
def pruning(server, make_device, tmp_path):
    """A device, and its open task whose plan prunes."""
    server.create_run(run_config(tmp_path, rounds=1, min_devices=1, method="hetlora"))
    device = make_device()
    return device, device.task()


def test_update_of_smaller_rank_is_accepted_where_the_plan_prunes(server, pruning):
    device, task = pruning

    assert [operation.name for operation in task.plan.operations] == ["prune_tail"]
    assert not device.upload(task, changed(device.update(task), pruned)).duplicate
    assert server.wait("test", timeout=20).state is RunState.FINISHED


def test_factors_of_a_pair_must_have_one_rank(pruning):
    device, task = pruning
    data = changed(device.update(task), lambda t: t.update({LORA_A: t[LORA_A][:2]}))

    with pytest.raises(grpc.RpcError) as caught:
        device.upload(task, data)

    assert error_code(caught.value) is ErrorCode.UPDATE_INVALID
    assert "of its pair" in caught.value.details()


def test_update_of_smaller_rank_is_refused_elsewhere_and_the_run_goes_on(
    server, make_device, tmp_path
):
    server.create_run(run_config(tmp_path, rounds=1, min_devices=2, min_updates=1))
    devices = [make_device(f"installation-{n}") for n in range(2)]
    for device in devices:
        device.next_task(0.0)
    tasks = [device.task() for device in devices]
    updates = [d.update(t) for d, t in zip(devices, tasks, strict=True)]

    with pytest.raises(grpc.RpcError) as caught:
        devices[0].upload(tasks[0], changed(updates[0], pruned))
    devices[1].upload(tasks[1], updates[1])

    assert error_code(caught.value) is ErrorCode.UPDATE_INVALID
    assert "shape (2, 6) is not (4, 6)" in caught.value.details()
    assert server.wait("test", timeout=20).state is RunState.FINISHED


@pytest.mark.parametrize("data", [b"", b"\x00garbage" * 100])
def test_update_that_is_no_bundle_is_refused(working, data):
    device, task, _ = working
    code = refused(device.upload, task, data)

    assert code is (ErrorCode.UPDATE_INVALID if data else ErrorCode.UPDATE_TOO_LARGE)


def test_update_without_examples_is_refused(working):
    device, task, _ = working
    device.examples = 0

    assert refused(device.upload, task, device.update(task)) is ErrorCode.UPDATE_INVALID


def test_health_and_reflection_answer_without_a_protocol(server):
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="lorikit.proto.v1.DeviceService"), timeout=10
        )
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(requests, timeout=10)

    assert health.status == health_pb2.HealthCheckResponse.SERVING
    names = {service.name for service in answer.list_services_response.service}
    assert "lorikit.proto.v1.DeviceService" in names
    assert "lorikit.proto.v1.OperatorService" in names


def test_stopping_server_sends_waiting_devices_away(tmp_path):
    config = server_config(tmp_path / "runs", max_wait_seconds=60.0, stop_seconds=5.0)
    server = start_server(config)
    device = Device(server.address).enrol()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(device.next_task(50.0)))
    waiting.start()
    eventually(lambda: server._coordinator._board.is_waiting(device.device_id))
    server.stop()
    waiting.join(10)
    device.close()

    assert answers[0].WhichOneof("outcome") == "wait"


def test_stopping_server_waits_for_those_that_fetch_the_last_adapter(tmp_path):
    server = start_server(server_config(tmp_path / "runs", handout_seconds=20.0))
    server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
    device = Device(server.address).enrol()
    finished = device.take_part(threading.Event())
    assert isinstance(finished, messages.Finished)
    server.wait("test")
    stopping = threading.Thread(target=server.stop)

    stopping.start()
    stopping.join(0.5)  # as long as a device may think before its next call
    adapter = device.download(finished.adapter)
    stopping.join(3.0)

    assert not stopping.is_alive()
    assert hashlib.sha256(adapter).hexdigest() == finished.adapter.digest
    assert not accepted(device.download, finished.adapter)
    device.close()


def test_foreseen_errors_carry_no_trace_of_the_server(server, make_device, monkeypatch):
    device = make_device()

    def broken(*_):
        raise RuntimeError("secret path /home/somebody")

    monkeypatch.setattr(server._coordinator._store, "current_task", broken)
    with pytest.raises(grpc.RpcError) as caught:
        device.next_task(0.0)

    assert error_code(caught.value) is ErrorCode.INTERNAL
    assert "secret" not in caught.value.details()
