# SPDX-License-Identifier: Apache-2.0
"""The operator service over real gRPC: runs are made, watched, stopped, and adapters fetched."""

from __future__ import annotations

import hashlib
import json
import math

import grpc
import pytest
from tests.server.federation import (
    crowd,
    error_code,
    eventually,
    run_config,
    server_config,
    start_server,
)

from lorikit.proto.limits import PROTOCOL_METADATA
from lorikit.proto.status import ErrorCode
from lorikit.proto.v1 import operator_service_pb2 as messages
from lorikit.proto.v1.operator_service_pb2_grpc import OperatorServiceStub

METADATA = [(PROTOCOL_METADATA, "1")]


@pytest.fixture
def server(tmp_path):
    with start_server(server_config(tmp_path / "runs")) as server:
        yield server


@pytest.fixture
def call(server):
    with grpc.insecure_channel(server.address) as channel:
        stub = OperatorServiceStub(channel)

        def call(method, request, *, metadata=METADATA):
            return getattr(stub, method)(request, metadata=metadata, timeout=30)

        yield call


@pytest.fixture
def create(call, tmp_path):
    def create(name="test", **changes):
        config = run_config(tmp_path, **changes).model_dump(mode="json", exclude={"name"})
        request = messages.CreateRunRequest(name=name, config_json=json.dumps(config))
        return call("CreateRun", request)

    return create


def refused(call, *args, **changes):
    with pytest.raises(grpc.RpcError) as caught:
        list(call(*args, **changes))  # a stream is refused when it is read
    return error_code(caught.value), caught.value.details()


def test_run_is_created_once_and_listed(call, create):
    first = create(rounds=2)
    again = create(rounds=2)
    runs = call("ListRuns", messages.ListRunsRequest()).runs

    assert first.run_id == again.run_id
    assert [run.name for run in runs] == ["test"]
    assert (first.method, first.round, first.rounds) == ("fedit", 0, 2)
    assert math.isnan(first.metric)


def test_name_with_other_settings_is_refused(create):
    create(rounds=2)

    assert refused(create, rounds=3)[0] is ErrorCode.RUN_EXISTS


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("not json", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "model is missing"),
        ('{"model": "m", "labels": ["a", "b"], "rounds": 0}', "rounds: "),
        ('{"model": "m", "labels": ["a", "b"], "rounds": 1, "epochs": 3}', "epochs"),
    ],
)
def test_wrong_settings_are_named(call, text, named):
    request = messages.CreateRunRequest(name="test", config_json=text)
    code, details = refused(call, "CreateRun", request)

    assert code is ErrorCode.CONFIG_INVALID
    assert named in details


@pytest.mark.parametrize("name", ["", ".server", "../x", "a/b", "x" * 65])
def test_name_that_is_no_plain_name_is_refused(create, name):
    assert refused(create, name)[0] is ErrorCode.CONFIG_INVALID


def test_settings_nested_without_end_are_refused(call):
    request = messages.CreateRunRequest(name="deep", config_json="[" * 200_000)

    assert refused(call, "CreateRun", request)[0] is ErrorCode.CONFIG_INVALID


def test_event_number_beyond_any_is_no_fault(server, call, create):
    create(rounds=1)
    with crowd(server.address):
        server.wait("test", timeout=30)
    request = messages.WatchRunRequest(run_id="test", from_sequence=(1 << 64) - 1)

    assert list(call("WatchRun", request)) == []


def test_without_an_authority_there_is_nobody_to_administer(call):
    for method, request in (
        ("IssueToken", messages.IssueTokenRequest(valid_seconds=1)),
        ("RevokeIdentity", messages.RevokeIdentityRequest(subject="device:ab")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(method, request)
        assert error_code(caught.value) is ErrorCode.REQUEST_INVALID


def test_other_protocol_is_refused(call):
    request = messages.ListRunsRequest()

    code, _ = refused(call, "ListRuns", request, metadata=[(PROTOCOL_METADATA, "2")])

    assert code is ErrorCode.PROTOCOL_UNSUPPORTED


def test_unknown_run_is_refused(call):
    for method, request in (
        ("GetRun", messages.GetRunRequest(run_id="x")),
        ("StopRun", messages.StopRunRequest(run_id="x")),
        ("WatchRun", messages.WatchRunRequest(run_id="x")),
        ("ListAdapters", messages.ListAdaptersRequest(run_id="x")),
    ):
        assert refused(call, method, request)[0] is ErrorCode.RUN_UNKNOWN


def test_events_are_streamed_until_the_run_ends(server, call, create, tmp_path):
    create(rounds=2)
    with crowd(server.address):
        stream = call("WatchRun", messages.WatchRunRequest(run_id="test"))
        events = [(e.sequence, e.kind, json.loads(e.facts_json)) for e in stream]

    assert [sequence for sequence, _, _ in events] == list(range(1, len(events) + 1))
    states = [facts["state"] for _, kind, facts in events if kind == "state"]
    assert states == ["preparing", "running", "finished"]
    rounds = [(f["round"], f["state"]) for _, kind, f in events if kind == "round"]
    each = ["assigning", "training", "aggregating", "evaluating", "closed"]
    assert rounds == [(number, state) for number in range(2) for state in each]
    assert sum(kind == "update" for _, kind, _ in events) == 6
    assert [f["round"] for _, kind, f in events if kind == "evaluation"] == [0, 1]
    assert json.loads((tmp_path / "runs/test/report.json").read_text())["state"] == "finished"


def test_watching_goes_on_from_a_sequence_number(server, call, create):
    create(rounds=1)
    with crowd(server.address):
        server.wait("test", timeout=30)
    every = list(call("WatchRun", messages.WatchRunRequest(run_id="test")))
    rest = list(call("WatchRun", messages.WatchRunRequest(run_id="test", from_sequence=5)))

    assert rest == every[4:]


def test_report_is_there_while_the_run_goes_on(server, call, create):
    create(rounds=1000)
    with crowd(server.address):
        eventually(lambda: server.summary("test").round >= 1)
        answer = call("GetRun", messages.GetRunRequest(run_id="test"))
        call("StopRun", messages.StopRunRequest(run_id="test", at_once=True))
        server.wait("test", timeout=30)

    report = json.loads(answer.report_json)
    assert answer.summary.state == "running"
    assert 0 <= answer.summary.metric <= 1
    assert report["rounds"][0]["state"] == "closed"


def test_adapter_is_fetched_file_by_file(server, call, create, tmp_path):
    create(rounds=1)
    with crowd(server.address):
        server.wait("test", timeout=30)
    names = call("ListAdapters", messages.ListAdaptersRequest(run_id="test")).names
    chunks = list(
        call("FetchAdapter", messages.FetchAdapterRequest(run_id="test", name="final/rank-4"))
    )

    assert list(names) == ["final/rank-4", "round-0000/rank-4"]
    folder = tmp_path / "runs" / "test" / "adapter" / "rank-4"
    assert {chunk.file for chunk in chunks} == {path.name for path in folder.iterdir()}
    for chunk in chunks:
        data = (folder / chunk.file).read_bytes()
        assert chunk.data == data
        assert chunk.total_size == len(data)
        assert chunk.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["final/rank-5", "../test/adapter/rank-4", "/etc", ""])
def test_unknown_adapter_is_refused(call, create, name):
    create()
    request = messages.FetchAdapterRequest(run_id="test", name=name)

    assert refused(call, "FetchAdapter", request)[0] is ErrorCode.ADAPTER_UNKNOWN
