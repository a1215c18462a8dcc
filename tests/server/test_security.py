# SPDX-License-Identifier: Apache-2.0
"""Whoever does not belong is refused, over real gRPC, with a code and a line in the audit log."""

from __future__ import annotations

import hashlib
import socket
import threading
import tracemalloc
import zlib

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests.server.federation import (
    Device,
    error_code,
    run_config,
    upload_requests,
)
from tests.server.secured import METADATA, Badge, SecuredServer

from lorikit.proto.limits import DEVICE_METADATA, PROTOCOL_METADATA, TOKEN_METADATA
from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Bundle, Encoded, pack, unpack
from lorikit.proto.v1 import device_service_pb2 as messages
from lorikit.proto.v1 import operator_service_pb2 as operator_messages
from lorikit.proto.v1.device_service_pb2_grpc import DeviceServiceStub
from lorikit.sdk._keys import new_key, signing_request
from lorikit.server.app import ServerError
from lorikit.server.config import LimitsConfig
from lorikit.server.identity.authority import Authority
from lorikit.server.identity.subjects import Role, device_subject


@pytest.fixture
def secured(tmp_path):
    with SecuredServer(tmp_path / "runs") as secured:
        yield secured


def refused(call, *args, **kwargs) -> ErrorCode:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    return error_code(caught.value)


def turned_away(device: Device) -> None:
    """TLS refuses the handshake: no call is served, and none of our codes comes."""
    with pytest.raises(grpc.RpcError) as caught:
        device.next_task(0.0)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    device.close()


def issued(secured: SecuredServer, subject: str, *, days: float, key: bytes) -> bytes:
    """A certificate of the authority that the store knows of."""
    public = load_pem_private_key(key, password=None).public_key()
    pem, facts = secured.authority.issue_client(subject, public, role="device", days=days)
    secured.store.add_certificate(facts)
    return pem


def test_device_with_a_certificate_takes_part(secured, tmp_path):
    secured.server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
    device, _ = secured.enrolled()
    device.work(device.task())
    device.close()
    secured.server.wait("test", timeout=30)

    subject = device_subject(device.device_id)
    assert [row.action for row in secured.lines(actor=subject, outcome="ok")] == [
        *("fetch", "fetch", "train"),
    ]
    (enrolled,) = secured.lines(action="enrol", outcome="ok")
    assert enrolled.subject == subject


def test_no_certificate(secured):
    turned_away(
        Device(secured.server.address, credentials=grpc.ssl_channel_credentials(secured.roots))
    )
    front = secured.front()

    assert refused(front.next_task, 0.0) is ErrorCode.CERTIFICATE_REQUIRED
    front.close()
    assert refused(secured.why, b"") is ErrorCode.CERTIFICATE_REQUIRED
    (line,) = secured.lines(action="NextTask")
    assert line.outcome == "CERTIFICATE_REQUIRED"
    assert line.actor.startswith("unknown:")


def test_foreign_certificate(secured, tmp_path):
    other = Authority.create(tmp_path / "other", hosts=["localhost"])
    key = new_key()
    public = load_pem_private_key(key, password=None).public_key()
    device, _ = secured.enrolled()
    pem, _ = other.issue_client(device_subject(device.device_id), public, role="device", days=1)
    device.close()

    turned_away(secured.connected(Badge(key, pem)))
    assert refused(secured.why, pem) is ErrorCode.CERTIFICATE_FOREIGN
    assert len(secured.lines(outcome="CERTIFICATE_FOREIGN")) == 1


def test_expired_certificate(secured):
    device, badge = secured.enrolled()
    subject = device_subject(device.device_id)
    device.close()
    expired = issued(secured, subject, days=-0.001, key=badge.key)

    turned_away(secured.connected(Badge(badge.key, expired)))
    assert refused(secured.why, expired) is ErrorCode.CERTIFICATE_EXPIRED
    assert len(secured.lines(outcome="CERTIFICATE_EXPIRED")) == 1


def test_certificate_that_expires_while_it_is_used(secured, monkeypatch):
    device, _ = secured.enrolled()
    assert device.next_task(0.0).WhichOneof("outcome") == "wait"
    later = secured.store._clock() + 91 * 86_400
    served = secured.server._coordinator._store
    monkeypatch.setattr(served, "_clock", lambda: later)

    assert refused(device.next_task, 0.0) is ErrorCode.CERTIFICATE_EXPIRED
    device.close()
    assert [row.action for row in secured.lines(outcome="CERTIFICATE_EXPIRED")] == ["NextTask"]


def test_revoked_certificate_ends_at_once_on_an_open_connection(secured):
    device, badge = secured.enrolled()
    assert device.next_task(0.0).WhichOneof("outcome") == "wait"
    subject = device_subject(device.device_id)
    secured.registry.revoke(subject, reason="phone lost")

    assert refused(device.next_task, 0.0) is ErrorCode.CERTIFICATE_REVOKED
    device.close()
    assert refused(secured.why, badge.certificate) is ErrorCode.CERTIFICATE_REVOKED
    (line,) = secured.lines(actor=subject, outcome="CERTIFICATE_REVOKED")
    assert (line.action, line.detail) == ("NextTask", "phone lost")


def test_certificate_ends_when_the_renewed_one_is_used(secured):
    device, _ = secured.enrolled()
    key = new_key()
    request = messages.RenewCertificateRequest(signing_request=signing_request(key))
    fresh = Badge(key, device.call("RenewCertificate", request).certificate)

    assert device.next_task(0.0).WhichOneof("outcome") == "wait"
    renewed = secured.connected(fresh)
    assert renewed.next_task(0.0).WhichOneof("outcome") == "wait"
    renewed.close()
    assert refused(device.next_task, 0.0) is ErrorCode.CERTIFICATE_REVOKED
    device.close()


def test_device_certificate_opens_nothing_but_its_own_device(secured, tmp_path):
    secured.server.create_run(run_config(tmp_path, rounds=1, min_devices=2))
    thief, badge = secured.enrolled("installation-0")
    other, _ = secured.enrolled("installation-1")
    thief.next_task(0.0)
    task = other.task()
    data = other.update(task)

    assert refused(thief.upload, task, data) is ErrorCode.TASK_UNKNOWN
    metadata = [*METADATA, (DEVICE_METADATA, other.device_id)]
    call = thief.stub.NextTask
    request = messages.NextTaskRequest(wait_seconds=0)
    assert refused(call, request, metadata=metadata) is ErrorCode.IDENTITY_REQUIRED
    empty = operator_messages.ListRunsRequest()
    assert refused(secured.ask, badge, "ListRuns", empty) is ErrorCode.ROLE_REQUIRED
    outcomes = [row.outcome for row in secured.lines(actor=device_subject(thief.device_id))]
    assert [o for o in outcomes if o != "ok"] == [
        *("TASK_UNKNOWN", "IDENTITY_REQUIRED", "ROLE_REQUIRED"),
    ]
    thief.close(), other.close()


@pytest.mark.parametrize(
    ("method", "request_", "least"),
    [
        ("ListRuns", operator_messages.ListRunsRequest(), Role.VIEWER),
        ("GetRun", operator_messages.GetRunRequest(run_id="none"), Role.VIEWER),
        ("StopRun", operator_messages.StopRunRequest(run_id="none"), Role.OPERATOR),
        ("CreateRun", operator_messages.CreateRunRequest(name="x", config_json="1"), Role.OPERATOR),
        ("IssueToken", operator_messages.IssueTokenRequest(valid_seconds=5), Role.ADMIN),
        ("RevokeIdentity", operator_messages.RevokeIdentityRequest(subject="?"), Role.ADMIN),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_role(secured, method, request_, least):
    roles = [Role.VIEWER, Role.OPERATOR, Role.ADMIN]
    refusals = []
    for role in roles:
        badge = secured.operator(f"ann-{role}", role)
        try:
            secured.ask(badge, method, request_)
        except grpc.RpcError as error:
            if error_code(error) is ErrorCode.ROLE_REQUIRED:
                refusals.append(role)

    assert refusals == roles[: roles.index(least)]
    lines = secured.lines(action=method, outcome="ROLE_REQUIRED")
    assert [row.actor for row in lines] == [f"operator:ann-{role}" for role in refusals]


def test_operator_certificate_is_no_device(secured):
    badge = secured.operator("ann", Role.ADMIN)
    device = secured.connected(badge)

    assert refused(device.next_task, 0.0) is ErrorCode.ROLE_REQUIRED
    device.close()


def test_replayed_token(secured):
    token = secured.token()
    key = new_key()
    device_id, badge = secured.badge("installation-0", token=token, key=key)

    again, _ = secured.badge("installation-0", token=token, key=key)  # the answer was lost
    assert again == device_id
    assert refused(secured.badge, "installation-1", token=token) is ErrorCode.ENROLMENT_REFUSED
    assert refused(secured.badge, "installation-0", token=token) is ErrorCode.ENROLMENT_REFUSED
    device = secured.connected(badge)
    device.next_task(0.0)
    device.close()
    assert (
        refused(secured.badge, "installation-0", token=token, key=key)
        is ErrorCode.ENROLMENT_REFUSED
    )
    lines = secured.lines(action="Enrol", outcome="ENROLMENT_REFUSED")
    assert [row.detail for row in lines] == ["the token has been used"] * 3


def test_spent_token_does_not_undo_a_revocation(secured):
    token, key = secured.token(), new_key()
    device_id, _ = secured.badge("installation-0", token=token, key=key)
    secured.registry.revoke(device_subject(device_id), reason="lost")

    assert (
        refused(secured.badge, "installation-0", token=token, key=key)
        is ErrorCode.ENROLMENT_REFUSED
    )


@pytest.mark.parametrize("token", ["", "guess", "x" * 10_000])
def test_wrong_token(secured, token):
    assert refused(secured.badge, "installation-0", token=token) is ErrorCode.ENROLMENT_REFUSED
    assert len(secured.lines(action="Enrol", outcome="ENROLMENT_REFUSED")) == 1
    assert secured.store.certificates() == []


def test_token_that_is_too_old(secured, monkeypatch):
    token = secured.token(valid_seconds=5.0)
    served = secured.server._coordinator._store
    monkeypatch.setattr(served, "_clock", lambda: secured.store._clock() + 6)

    assert refused(secured.badge, "installation-0", token=token) is ErrorCode.ENROLMENT_REFUSED


def test_identity_in_use_is_not_taken_over_with_another_token(secured):
    device, _ = secured.enrolled()

    assert (
        refused(secured.badge, "installation-0", token=secured.token())
        is ErrorCode.ENROLMENT_REFUSED
    )
    assert device.next_task(0.0).WhichOneof("outcome") == "wait"
    device.close()


def test_replayed_update(secured, tmp_path):
    secured.server.create_run(run_config(tmp_path, rounds=1, min_devices=2))
    device, _ = secured.enrolled("installation-0")
    other, _ = secured.enrolled("installation-1")
    other.next_task(0.0)
    task = device.task()
    data = device.update(task)
    assert not device.upload(task, data).duplicate
    assert device.upload(task, data).duplicate  # idempotent: counted once
    tensors = {n: np.array(e.parts["values"]) for n, e in unpack(data).tensors.items()}
    changed = device.packed({n: t + 1 for n, t in tensors.items()})

    assert refused(device.upload, task, changed) is ErrorCode.UPDATE_REPLAYED
    assert refused(other.upload, task, data) is ErrorCode.TASK_UNKNOWN
    assert len(secured.lines(action="UploadUpdate", outcome="UPDATE_REPLAYED")) == 1
    assert len(secured.lines(action="UploadUpdate", outcome="TASK_UNKNOWN")) == 1
    device.close(), other.close()


def test_downgrade_to_a_secret_or_an_older_protocol(secured):
    device, _ = secured.enrolled()
    device_id = device.device_id
    device.close()
    front = secured.front()
    metadata = [*METADATA, (DEVICE_METADATA, device_id), (TOKEN_METADATA, "")]
    request = messages.NextTaskRequest(wait_seconds=0)
    older = messages.EnrolRequest(installation_id="installation-9")

    assert refused(front.stub.NextTask, request, metadata=metadata) is (
        ErrorCode.CERTIFICATE_REQUIRED
    )
    assert refused(front.stub.Enrol, older, metadata=[(PROTOCOL_METADATA, "0")]) is (
        ErrorCode.PROTOCOL_UNSUPPORTED
    )
    assert refused(front.enrol) is ErrorCode.ENROLMENT_REFUSED  # without a signing request
    front.close()
    outcomes = [row.outcome for row in secured.lines() if row.outcome != "ok"]
    assert outcomes == ["CERTIFICATE_REQUIRED", "PROTOCOL_UNSUPPORTED", "ENROLMENT_REFUSED"]


def test_plain_text_is_not_answered(secured):
    for address in (secured.server.address, secured.server.enrol_address):
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            DeviceServiceStub(channel).NextTask(
                messages.NextTaskRequest(), metadata=METADATA, timeout=5
            )
        assert caught.value.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )


def test_slow_loris_stream(tmp_path):
    limits = LimitsConfig(stall_seconds=0.5)
    with SecuredServer(tmp_path / "runs", limits=limits) as secured:
        secured.server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
        device, _ = secured.enrolled()
        task = device.task()
        data = device.update(task)
        over = threading.Event()

        def drops():
            yield next(upload_requests(task, data))
            over.wait(30)

        assert refused(device.call, "UploadUpdate", drops()) is ErrorCode.STREAM_STALLED
        over.set()
        assert not device.upload(task, data).duplicate  # its place is free again
        device.close()
        assert len(secured.lines(action="UploadUpdate", outcome="STREAM_STALLED")) == 1


def test_stream_that_drips(tmp_path):
    limits = LimitsConfig(stall_seconds=0.5, min_bytes_per_second=1e9)
    with SecuredServer(tmp_path / "runs", limits=limits) as secured:
        secured.server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
        device, _ = secured.enrolled()
        task = device.task()
        data = device.update(task)
        over = threading.Event()

        def drips():
            for request in upload_requests(task, data, chunk_bytes=1):
                yield request
                if over.wait(0.2):
                    return

        assert refused(device.call, "UploadUpdate", drips()) is ErrorCode.STREAM_STALLED
        over.set()
        device.close()


def test_ten_gigabytes_declared(secured, tmp_path):
    secured.server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
    device, _ = secured.enrolled()
    task = device.task()
    data = device.update(task)
    requests = upload_requests(task, data, total_size=10 << 30)

    assert refused(device.call, "UploadUpdate", requests) is ErrorCode.UPDATE_TOO_LARGE
    device.close()
    (line,) = secured.lines(action="UploadUpdate", outcome="UPDATE_TOO_LARGE")
    assert line.detail.startswith("10737418240 bytes")


def test_message_that_declares_ten_gigabytes(secured):
    """A message inside a message that claims more bytes than there are."""
    device, _ = secured.enrolled()
    length = bytes([0x80, 0x80, 0x80, 0x80, 0x28])  # the varint of 10 << 30
    call = device.channel.unary_unary("/lorikit.proto.v1.DeviceService/NextTask")

    torn = bytes([0x12]) + length
    assert refused(call, torn, metadata=METADATA, timeout=20) is ErrorCode.REQUEST_INVALID
    assert len(secured.lines(action="NextTask", outcome="REQUEST_INVALID")) == 1
    assert device.next_task(0.0).WhichOneof("outcome") == "wait"
    device.close()


def test_compressed_message_is_not_unpacked(secured):
    """A gzip bomb at the level of gRPC: 3 MiB of zeros in 3 KiB."""
    device, _ = secured.enrolled()
    call = device.channel.unary_unary("/lorikit.proto.v1.DeviceService/ReportFailure")

    with pytest.raises(grpc.RpcError) as caught:
        call(bytes(3 << 20), metadata=METADATA, compression=grpc.Compression.Gzip, timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    device.close()


def test_decompression_bomb(secured, tmp_path):
    """4 KiB that unpack to 4 MiB, where the plan allows 6 KiB."""
    secured.server.create_run(run_config(tmp_path, rounds=1, min_devices=1))
    device, _ = secured.enrolled()
    task = device.task()
    packed = np.frombuffer(zlib.compress(bytes(4 << 20), 9), np.uint8)
    bomb = pack(Bundle({"zlib": Encoded("zlib", packed.shape, {"data": packed})}, {}))

    tracemalloc.start()
    try:
        with pytest.raises(grpc.RpcError, match="unpack to more than") as caught:
            device.upload(task, bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    device.close()
    assert error_code(caught.value) is ErrorCode.UPDATE_INVALID
    assert peak < 1 << 20
    (line,) = secured.lines(action="UploadUpdate", outcome="UPDATE_INVALID")
    assert "unpack to more than" in line.detail


def test_too_many_calls(tmp_path):
    limits = LimitsConfig(calls_per_second=0.001, call_burst=3)
    with SecuredServer(tmp_path / "runs", limits=limits) as secured:
        device, _ = secured.enrolled("installation-0")
        other, _ = secured.enrolled("installation-1")
        for _ in range(3):
            device.next_task(0.0)

        assert refused(device.next_task, 0.0) is ErrorCode.RATE_LIMITED
        assert other.next_task(0.0).WhichOneof("outcome") == "wait"
        device.close(), other.close()
        (line,) = secured.lines(outcome="RATE_LIMITED")
        assert line.actor == device_subject(device.device_id)


def test_admin_lets_in_and_cuts_off_from_afar(secured):
    admin = secured.operator("root", Role.ADMIN)
    issue = operator_messages.IssueTokenRequest(valid_seconds=60)
    token = secured.ask(admin, "IssueToken", issue).token
    device_id, badge = secured.badge("installation-0", token=token)
    subject = device_subject(device_id)
    revoke = operator_messages.RevokeIdentityRequest(subject=subject, reason="lost")

    assert secured.ask(admin, "RevokeIdentity", revoke).revoked == 1
    device = secured.connected(badge)
    assert refused(device.next_task, 0.0) is ErrorCode.CERTIFICATE_REVOKED
    device.close()
    done = [(row.action, row.subject) for row in secured.lines(actor="operator:root")]
    assert done == [("issue-token", ""), ("revoke", subject)]
    hidden = [row.detail + row.subject for row in secured.lines()]
    assert not any(
        token in text or hashlib.sha256(token.encode()).hexdigest() in text for text in hidden
    )


def test_port_for_enrolment_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        secured = SecuredServer(tmp_path / "runs", enrol_address=address)

        with pytest.raises(ServerError, match=f"cannot listen on '{address}'"):
            secured.__enter__()
