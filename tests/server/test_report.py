# SPDX-License-Identifier: Apache-2.0
"""The report says what the store knows, and is never half-written."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tests.server.federation import run_config

from lorikit.proto.device import TrainingReport
from lorikit.server.report import build_report, write_report, written_state
from lorikit.server.states import RunState, TaskState
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import TaskRow

DIGEST = "a" * 64
DEVICE_FIELDS = {
    "device",
    "class",
    "engine",
    "precision",
    "rank",
    "trained_layers",
    "kept_layers",
    "micro_batch",
    "peak_memory_bytes",
    "predicted_peak_memory_bytes",
    "seconds",
    "bytes_up",
    "bytes_down",
    "examples",
    "status",
}
ROUND_FIELDS = {"round", "metric", "loss", "seconds", "bytes_up", "bytes_down", "devices"}
RUN_FIELDS = {"method", "model", "task", "seed", "rounds", "baselines", "final_metric"}

FACTS = {
    "class": "phone",
    "precision": "nf4",
    "rank": 8,
    "trained_layers": [4, 5],
    "kept_layers": [0, 1, 2, 3, 4, 5],
    "micro_batch": 2,
    "predicted_peak_memory_bytes": 140,
}
REPORT = TrainingReport(
    examples=96,
    dataset_size=40,
    training_seconds=2.5,
    peak_memory_bytes=150,
    engine="onnx",
    bytes_down=1000,
    steps=12,
    rank=7,
    last_loss=0.25,
)


@pytest.fixture
def store(tmp_path):
    """A run with one closed round: one device sent its update, one failed."""
    now = iter(range(10_000))
    store = SqlStore(f"sqlite:///{tmp_path / 'test.sqlite'}", clock=lambda: float(next(now)))
    store.create_run("r", "test", run_config(tmp_path).canonical())
    for device in ("d1", "d2"):
        store.enrol(device, installation_id=device, token_hash="", profile="{}", max_devices=2)
        store.join("r", device)
    store.start_run("r", initial_digest=DIGEST)
    store.open_round("r", 0)
    store.start_training("r", 0, [task("t1", "d1"), task("t2", "d2")])
    store.accept_update(
        "t1", digest=DIGEST, size=300, examples=40, report=dataclasses.asdict(REPORT)
    )
    store.end_task("t2", TaskState.FAILED, error="OutOfMemoryError", message="no memory")
    store.start_aggregating("r", 0)
    store.start_evaluating("r", 0, state_digest=DIGEST)
    store.close_round("r", 0, metrics={"accuracy": 0.75, "loss": 0.5}, examples=4)
    yield store
    store.close()


def task(name, device):
    return TaskRow(
        id=name,
        update_id=f"u-{name}",
        run_id="r",
        round=0,
        attempt=0,
        device_id=device,
        kind="train",
        plan=b"",
        package_digest=DIGEST,
        package_size=1,
        adapter_digest=DIGEST,
        adapter_size=1,
        assignment="{}",
        expected="{}",
        max_update_bytes=1000,
        facts=json.dumps(FACTS),
    )


def test_report_has_the_fields_that_others_rely_on(store):
    report = build_report(store, "r")

    assert report.keys() >= RUN_FIELDS
    assert report["rounds"][0].keys() >= ROUND_FIELDS
    assert all(device.keys() >= DEVICE_FIELDS for device in report["rounds"][0]["devices"])


def test_report_says_what_happened(store):
    report = build_report(store, "r")
    (first,) = report["rounds"]
    done, failed = first["devices"]

    assert (report["final_metric"], first["metric"], first["loss"]) == (0.75, 0.75, 0.5)
    assert (first["bytes_up"], first["bytes_down"]) == (300, 1000)
    assert first["seconds"] > 0
    assert (done["status"], done["rank"], done["assigned_rank"]) == ("done", 7, 8)
    assert (done["peak_memory_bytes"], done["predicted_peak_memory_bytes"]) == (150, 140)
    assert (done["class"], done["engine"], done["precision"]) == ("phone", "onnx", "nf4")
    assert (done["examples"], done["dataset_size"], done["seconds"]) == (96, 40, 2.5)
    assert (failed["status"], failed["error"]) == ("failed", "OutOfMemoryError")
    assert failed["bytes_up"] == 0


def test_report_before_the_first_measurement_has_no_metric(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path / 'test.sqlite'}")
    store.create_run("r", "test", run_config(tmp_path).canonical())

    assert build_report(store, "r")["final_metric"] is None
    store.close()


def test_report_replaces_the_last_one_and_keeps_baselines(store, tmp_path):
    write_report(tmp_path, store, "r")
    path = tmp_path / "report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "baselines": {"central": {"metric": 0.9}}}))
    store.end_run("r", RunState.FINISHED)

    write_report(tmp_path, store, "r")

    report = json.loads(path.read_text())
    assert report["baselines"] == {"central": {"metric": 0.9}}
    assert written_state(tmp_path) == report["state"] == "finished"
    assert sorted(p.name for p in tmp_path.glob("*report*")) == ["report.html", "report.json"]


def test_page_for_people_stands_beside_the_report(store, tmp_path):
    write_report(tmp_path, store, "r")

    page = (tmp_path / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_damaged_report_is_written_anew(store, tmp_path):
    (tmp_path / "report.json").write_text('{"half')
    assert written_state(tmp_path) is None

    write_report(tmp_path, store, "r")

    assert json.loads((tmp_path / "report.json").read_text())["baselines"] == {}


def test_failed_write_leaves_the_old_report(store, tmp_path, monkeypatch):
    write_report(tmp_path, store, "r")
    before = (tmp_path / "report.json").read_bytes()

    def disk_full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, store, "r")

    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.glob("*report*")) == ["report.html", "report.json"]
