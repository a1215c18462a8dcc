# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import math
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from tests.sdk.loopback import Loopback, chunk_message, drop, refuse

from lorikit.proto.device import EngineInfo, Profile, TrainingReport
from lorikit.proto.limits import MAX_CHUNK_BYTES
from lorikit.proto.manifest import BlobRef, digest_of
from lorikit.proto.plan import Operation, Plan
from lorikit.proto.status import STATUS, ErrorCode
from lorikit.proto.v1 import device_service_pb2 as pb
from lorikit.proto.wire import blob_to_message, plan_to_message
from lorikit.sdk import _transport
from lorikit.sdk._config import ClientConfig
from lorikit.sdk._errors import (
    CancelledError,
    ConnectionLostError,
    DamagedBlobError,
    IdentityError,
    LorikitError,
    PackageError,
    ProtocolVersionError,
    RoundClosedError,
    ServerRefusedError,
)
from lorikit.sdk._transport import (
    Finished,
    GrpcTransport,
    Lease,
    Refusal,
    RetryWindow,
    Task,
    UnreadableTask,
    UploadProgress,
)
from lorikit.sdk._wire_errors import ERRORS

DATA = bytes(range(256)) * 40
BLOB = BlobRef(digest=digest_of(DATA), size=len(DATA))
PLAN = Plan(method="fedit", operations=(Operation(name="class_sums"),))
PROFILE = Profile(
    memory_limit_bytes=256_000_000,
    device_class="phone",
    engines=(EngineInfo(name="onnx", version="1.20"),),
    operations=("class_sums@1",),
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Loopback]:
    (tmp_path / BLOB.digest).write_bytes(DATA)
    with Loopback(tmp_path) as server:
        yield server


@pytest.fixture
def transport(server: Loopback) -> Iterator[GrpcTransport]:
    transport = GrpcTransport(server.address, insecure=True)
    transport.identify("device", server.token)
    yield transport
    transport.close()


def task_message(**fields: object) -> pb.Task:
    return pb.Task(
        **{
            "task_id": "t",
            "run_id": "r",
            "round": 3,
            "kind": "train",
            "update_id": "u",
            "lease_seconds": 60.0,
            "plan": plan_to_message(PLAN),
            "package": blob_to_message(BLOB),
            "adapter": blob_to_message(BLOB),
            **fields,
        }  # type: ignore[arg-type]  # fields by name
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [(math.nan, 0.0), (math.inf, 86_400.0), (-math.inf, 0.0), (-5.0, 0.0), (1e300, 86_400.0)],
)
def test_times_that_no_clock_can_wait_for_are_bounded(
    server: Loopback, transport: GrpcTransport, given: float, kept: float
) -> None:
    window = pb.RetryWindow(min_seconds=given, max_seconds=given)
    server.faults["UploadStatus"].append(refuse(ErrorCode.SERVER_BUSY, retry_seconds=given))

    server.offers = [pb.NextTaskResponse(wait=window)]
    assert transport.next_task(0.0, None) == RetryWindow(min_seconds=kept, max_seconds=kept)
    server.offers = [pb.NextTaskResponse(task=task_message(lease_seconds=given))]
    task = transport.next_task(0.0, None)
    assert isinstance(task, Task)
    assert task.lease_seconds == kept
    with pytest.raises(ConnectionLostError) as caught:
        transport.upload_status("t", "u", BLOB.digest)
    assert caught.value.retry_seconds == kept


@pytest.mark.parametrize("token", ["x" * 201, "a\nb", "\N{SNOWMAN}"])
def test_identity_that_no_call_can_carry_is_refused(
    server: Loopback, transport: GrpcTransport, token: str
) -> None:
    server.token = token

    with pytest.raises(ServerRefusedError, match="no call can carry"):
        transport.enrol("abcdefgh", PROFILE, "")


def test_server_that_holds_more_than_there_is_is_refused(transport: GrpcTransport) -> None:
    with pytest.raises(ServerRefusedError, match="11 of 10 bytes"):
        transport.upload("t", "u", bytes(10), TrainingReport(), offset=11, on_sent=print)


def test_every_code_of_the_server_has_an_error_here() -> None:
    assert ERRORS.keys() == set(ErrorCode)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_code_arrives_as_its_error_with_the_public_sentence(
    server: Loopback, transport: GrpcTransport, code: ErrorCode
) -> None:
    server.faults["UploadStatus"].append(refuse(code))

    with pytest.raises(LorikitError) as caught:
        transport.upload_status("t", "u", BLOB.digest)

    assert type(caught.value) is ERRORS[code]
    assert str(caught.value) == STATUS[code].sentence
    if isinstance(caught.value, ServerRefusedError):
        assert caught.value.code is code


def test_busy_server_names_the_time_to_come_back(
    server: Loopback, transport: GrpcTransport
) -> None:
    server.faults["NextTask"].append(refuse(ErrorCode.SERVER_BUSY, retry_seconds=7.5))

    with pytest.raises(ConnectionLostError) as caught:
        transport.next_task(0.0, None)

    assert caught.value.retry_seconds == 7.5


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, ConnectionLostError),
        (grpc.StatusCode.INTERNAL, ConnectionLostError),
        (grpc.StatusCode.UNAUTHENTICATED, IdentityError),
        (grpc.StatusCode.UNIMPLEMENTED, ProtocolVersionError),
        (grpc.StatusCode.OUT_OF_RANGE, ServerRefusedError),
    ],
)
def test_status_without_a_code_of_ours_is_understood(
    server: Loopback,
    transport: GrpcTransport,
    status: grpc.StatusCode,
    expected: type[LorikitError],
) -> None:
    server.faults["NextTask"].append(drop(status))

    with pytest.raises(expected, match=status.name):
        transport.next_task(0.0, None)


def test_absent_server_is_a_lost_connection() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        transport = GrpcTransport(f"127.0.0.1:{unused.getsockname()[1]}", insecure=True)
        with pytest.raises(ConnectionLostError):
            transport.next_task(0.0, None)
        transport.close()


def test_silent_server_costs_no_more_than_the_deadline() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = ClientConfig(call_seconds=0.3)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        transport = GrpcTransport(address, insecure=True, config=config)
        started = time.monotonic()
        with pytest.raises(ConnectionLostError):
            transport.upload_status("t", "u", BLOB.digest)
        transport.close()

    assert time.monotonic() - started < 5


def test_old_protocol_is_told_to_update(
    server: Loopback, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transport, "PROTOCOL_VERSION", 0)
    old = GrpcTransport(server.address, insecure=True)

    with pytest.raises(ProtocolVersionError, match="update the older one"):
        old.enrol("installation", PROFILE, "")
    old.close()


def test_enrolment_sends_the_profile_and_gets_an_identity(
    server: Loopback, transport: GrpcTransport
) -> None:
    given = transport.enrol("abcdefgh", PROFILE, "")
    assert (given.device_id, given.token) == ("device-abcdef", "secret")

    (sent,) = server.profiles
    assert sent.memory_limit_bytes == 256_000_000
    assert sent.engines[0].name == "onnx"
    assert list(sent.operations) == ["class_sums@1"]


def test_unknown_token_asks_for_enrolment(server: Loopback, transport: GrpcTransport) -> None:
    transport.identify("device", "stolen")

    with pytest.raises(IdentityError):
        transport.next_task(0.0, None)


def test_heartbeat_tells_the_state_and_hears_the_lease(
    server: Loopback, transport: GrpcTransport
) -> None:
    server.go_on = False

    lease = transport.heartbeat("t", "training", 3, 12)

    assert lease == Lease(go_on=False, lease_seconds=0.6)
    assert (server.beats[0].task_id, server.beats[0].state) == ("t", "training")
    assert (server.beats[0].step, server.beats[0].steps) == (3, 12)


def test_task_arrives_typed(server: Loopback, transport: GrpcTransport) -> None:
    server.offers.append(pb.NextTaskResponse(task=task_message()))

    assert transport.next_task(0.0, PROFILE) == Task(
        task_id="t",
        run_id="r",
        round=3,
        kind="train",
        update_id="u",
        lease_seconds=60.0,
        plan=PLAN,
        package=BLOB,
        adapter=BLOB,
    )


def _with_plan_version(message: pb.Task) -> pb.Task:
    message.plan.version = 2
    return message


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (_with_plan_version(task_message()), "plan version 2"),
        (task_message(package=pb.BlobRef(digest="../../etc/passwd")), "not a SHA-256 digest"),
        (task_message(plan=pb.NextTaskResponse().task.plan), "plan version 0"),
    ],
)
def test_task_that_is_not_understood_keeps_its_name(
    server: Loopback, transport: GrpcTransport, message: pb.Task, reason: str
) -> None:
    server.offers.append(pb.NextTaskResponse(task=message))

    offer = transport.next_task(0.0, None)

    assert isinstance(offer, UnreadableTask)
    assert offer.task_id == "t"
    assert reason in offer.reason


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            pb.NextTaskResponse(wait=pb.RetryWindow(min_seconds=1.0, max_seconds=4.0)),
            RetryWindow(min_seconds=1.0, max_seconds=4.0),
        ),
        (
            pb.NextTaskResponse(refused=pb.Refusal(reason="why", remedy="how")),
            Refusal(reason="why", remedy="how"),
        ),
        (
            pb.NextTaskResponse(finished=pb.Finished(run_id="r")),
            Finished(run_id="r", package=None, adapter=None, inputs={}, max_length=0),
        ),
        (
            pb.NextTaskResponse(
                finished=pb.Finished(
                    run_id="r",
                    package=blob_to_message(BLOB),
                    adapter=blob_to_message(BLOB),
                    inputs={"lora_scale": 2.0},
                    max_length=32,
                )
            ),
            Finished(
                run_id="r", package=BLOB, adapter=BLOB, inputs={"lora_scale": 2.0}, max_length=32
            ),
        ),
    ],
)
def test_other_offers_arrive_typed(
    server: Loopback, transport: GrpcTransport, reply: pb.NextTaskResponse, expected: object
) -> None:
    server.offers.append(reply)

    assert transport.next_task(0.0, None) == expected


def test_offer_of_a_newer_kind_asks_for_an_update(
    server: Loopback, transport: GrpcTransport
) -> None:
    server.offers.append(pb.NextTaskResponse())

    with pytest.raises(ProtocolVersionError, match="update the SDK"):
        transport.next_task(0.0, None)


@pytest.mark.parametrize("offset", [0, 1, 5000, len(DATA) - 1])
def test_download_starts_at_the_offset(transport: GrpcTransport, offset: int) -> None:
    assert b"".join(transport.download(BLOB, offset)) == DATA[offset:]


def test_unknown_blob_is_a_package_error(transport: GrpcTransport) -> None:
    with pytest.raises(PackageError, match="No blob has that digest"):
        list(transport.download(BlobRef(digest="0" * 64, size=3), 0))


Spoil = Callable[[pb.DownloadBlobResponse], pb.DownloadBlobResponse | None]


def _changed(**fields: object) -> Spoil:
    def change(message: pb.DownloadBlobResponse) -> pb.DownloadBlobResponse:
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    return change


def _oversized(message: pb.DownloadBlobResponse) -> pb.DownloadBlobResponse:
    data = bytes(MAX_CHUNK_BYTES + 1)
    return _changed(data=data, chunk_digest=hashlib.sha256(data).digest())(message)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_changed(data=b"x" * 1000), "chunk at byte 1000 is damaged"),
        (_changed(chunk_digest=b""), "chunk at byte 1000 is damaged"),
        (_changed(data=b"", chunk_digest=hashlib.sha256(b"").digest()), "chunk of 0 bytes"),
        (_changed(offset=2000), "got byte 2000"),
        (_changed(total_size=10**12), "of 1000000000000, wanted 1000 of 10240"),
        (_oversized, "chunk of 2097153 bytes"),
        (lambda message: chunk_message(DATA + b"x", 1000, 9241), "of 10241, wanted"),
    ],
)
def test_spoilt_chunk_is_refused_and_what_came_before_is_kept(
    server: Loopback, transport: GrpcTransport, spoil: Spoil, reason: str
) -> None:
    server.spoil.append(spoil)
    received: list[bytes] = []

    with pytest.raises(DamagedBlobError, match=reason):
        received.extend(transport.download(BLOB, 0))

    assert received == [DATA[:1000]]


def test_truncated_stream_is_a_lost_connection(server: Loopback, transport: GrpcTransport) -> None:
    server.spoil.append(lambda message: None)

    with pytest.raises(ConnectionLostError, match="ended 9240 bytes early"):
        list(transport.download(BLOB, 0))


def test_upload_arrives_with_its_report(server: Loopback, transport: GrpcTransport) -> None:
    sent: list[int] = []
    data = DATA * 300
    report = TrainingReport(examples=40, accuracy=0.5)

    transport.upload("t", "u", data, report, offset=0, on_sent=sent.append)

    assert server.updates["u"] == data
    assert server.reports[0].examples == 40
    assert sent[-1] == len(data)
    assert len(sent) == 3


def test_upload_goes_on_where_it_broke(server: Loopback, transport: GrpcTransport) -> None:
    server.keep_upload_bytes = 4000
    with pytest.raises(ConnectionLostError):
        transport.upload("t", "u", DATA, TrainingReport(), offset=0, on_sent=lambda held: None)

    status = transport.upload_status("t", "u", BLOB.digest)
    transport.upload(
        "t", "u", DATA, TrainingReport(), offset=status.offset, on_sent=lambda held: None
    )

    assert status == UploadProgress(offset=4000, accepted=False)
    assert server.offsets == [0, 4000]
    assert server.updates["u"] == DATA
    assert transport.upload_status("t", "u", BLOB.digest).accepted


def test_reports_arrive(server: Loopback, transport: GrpcTransport) -> None:
    transport.report_evaluation("t", {"accuracy": 0.75}, 12)
    transport.report_failure("t", "DataError", "rows do not fit")

    assert dict(server.evaluations[0].metrics) == {"accuracy": 0.75}
    assert server.evaluations[0].examples == 12
    assert (server.failures[0].error, server.failures[0].message) == (
        "DataError",
        "rows do not fit",
    )


def test_interrupt_ends_a_call_that_waits(server: Loopback, transport: GrpcTransport) -> None:
    begun, release = threading.Event(), threading.Event()
    server.faults["NextTask"].append(lambda context: (begun.set(), release.wait(20)))  # type: ignore[arg-type]
    interrupter = threading.Thread(target=lambda: (begun.wait(20), transport.interrupt()))
    interrupter.start()

    with pytest.raises(CancelledError):
        transport.next_task(30.0, None)

    interrupter.join()
    release.set()


def test_interrupt_ends_a_download_that_hangs(server: Loopback, transport: GrpcTransport) -> None:
    begun, release = threading.Event(), threading.Event()
    server.spoil.append(lambda message: (begun.set(), release.wait(20), None)[2])  # type: ignore[func-returns-value]
    interrupter = threading.Thread(target=lambda: (begun.wait(20), transport.interrupt()))
    interrupter.start()

    with pytest.raises(CancelledError):
        list(transport.download(BLOB, 0))

    interrupter.join()
    release.set()


def test_after_an_interrupt_no_call_starts_until_resumed(
    server: Loopback, transport: GrpcTransport
) -> None:
    transport.interrupt()
    with pytest.raises(CancelledError):
        transport.heartbeat("t", "training", 0, 0)
    with pytest.raises(CancelledError):
        list(transport.download(BLOB, 0))

    transport.resume()

    assert transport.heartbeat("t", "training", 0, 0).go_on


def test_round_that_closed_says_so(server: Loopback, transport: GrpcTransport) -> None:
    server.faults["Heartbeat"].append(refuse(ErrorCode.ROUND_CLOSED))

    with pytest.raises(RoundClosedError):
        transport.heartbeat("t", "training", 0, 0)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[bytes, bytes]:
    """Key and certificate of a server on 127.0.0.1, made for this test."""
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs the openssl command")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=lorikit", "-addext"),
            *("subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return key.read_bytes(), certificate.read_bytes()


def test_encrypted_connection_trusts_the_given_authority_only(
    tmp_path: Path, certificate: tuple[bytes, bytes]
) -> None:
    (tmp_path / BLOB.digest).write_bytes(DATA)
    with Loopback(tmp_path, grpc.ssl_server_credentials([certificate])) as server:
        trusting = GrpcTransport(server.address, root_certificates=certificate[1])
        trusting.identify("device", server.token)
        assert b"".join(trusting.download(BLOB, 0)) == DATA
        trusting.close()

        for stranger in (
            GrpcTransport(server.address),
            GrpcTransport(server.address, insecure=True),
        ):
            with pytest.raises(ConnectionLostError):
                stranger.enrol("installation", PROFILE, "")
            stranger.close()

    assert server.calls == {"DownloadBlob": 1}
