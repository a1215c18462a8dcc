# SPDX-License-Identifier: Apache-2.0
"""What every store must do; each database has a subclass of the shared tests."""

from __future__ import annotations

import json
import os
import threading

import pytest
from sqlalchemy import create_engine, text

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.states import RoundState, RunState, TaskState, TransitionError
from lorikit.server.store.database import StoreError
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import Table, TaskRow

DIGEST = "a" * 64


def task(name: str, *, device: str = "d1", number: int = 0, attempt: int = 0, kind: str = "train"):
    return TaskRow(
        id=name,
        update_id=f"update-{name}",
        run_id="r",
        round=number,
        attempt=attempt,
        device_id=device,
        kind=kind,
        plan=b"plan",
        package_digest=DIGEST,
        package_size=1,
        adapter_digest=DIGEST,
        adapter_size=1,
        assignment="{}",
        expected="{}",
        max_update_bytes=100,
        facts="{}",
    )


class StoreBehaviour:
    @pytest.fixture
    def url(self, tmp_path):
        raise NotImplementedError

    @pytest.fixture
    def store(self, url):
        self.now = 100.0
        store = SqlStore(url, clock=lambda: self.now)
        yield store
        store.close()

    @pytest.fixture
    def running(self, store):
        """A run in its first round, with two devices that take part."""
        store.create_run("r", "demo", "{}")
        for device in ("d1", "d2"):
            self.enrol(store, device)
            store.join("r", device)
        store.start_run("r", initial_digest=DIGEST)
        store.open_round("r", 0)
        return store

    @pytest.fixture
    def training(self, running):
        running.start_training("r", 0, [task("t1"), task("t2", device="d2")])
        return running

    def enrol(self, store, device, *, token="h", profile="{}", max_devices=10):
        return store.enrol(
            device,
            installation_id=f"installation of {device}",
            token_hash=token,
            profile=profile,
            max_devices=max_devices,
        )

    def accept(self, store, name, digest=DIGEST):
        return store.accept_update(name, digest=digest, size=5, examples=3, report={"steps": 1})

    def test_run_is_created_once(self, store):
        first = store.create_run("r", "demo", "{}")
        again = store.create_run("other", "demo", "{}")

        assert (again.id, again.state) == (first.id, RunState.PREPARING)
        assert store.run("demo").id == store.run("r").id == "r"

    def test_name_with_other_settings_is_refused(self, store):
        store.create_run("r", "demo", "{}")

        with pytest.raises(RequestError) as caught:
            store.create_run("s", "demo", '{"rounds":2}')

        assert caught.value.code is ErrorCode.RUN_EXISTS

    def test_unknown_run_is_refused(self, store):
        with pytest.raises(RequestError) as caught:
            store.run("nobody")

        assert caught.value.code is ErrorCode.RUN_UNKNOWN

    def test_enrolling_again_keeps_the_identity_and_changes_the_secret(self, store):
        self.enrol(store, "d1", token="old")
        device = self.enrol(store, "another id", profile='{"cores":2}')
        assert device.installation_id != "installation of d1"

        again = store.enrol(
            "ignored",
            installation_id="installation of d1",
            token_hash="new",
            profile="{}",
            max_devices=10,
        )

        assert again.id == "d1"
        assert store.device("d1").token_hash == "new"

    def test_devices_are_bounded(self, store):
        self.enrol(store, "d1", max_devices=1)

        with pytest.raises(RequestError) as caught:
            self.enrol(store, "d2", max_devices=1)

        assert caught.value.code is ErrorCode.SERVER_BUSY
        assert self.enrol(store, "d1", max_devices=1).id == "d1"

    def test_fresh_profile_lifts_a_refusal(self, running):
        running.refuse("r", "d1", reason="too small", remedy="more memory")
        assert running.members("r")[0][0].refused_reason == "too small"

        assert not running.set_profile("d1", "{}")
        assert running.members("r")[0][0].refused_reason == "too small"
        assert running.set_profile("d1", '{"cores":4}')
        assert running.members("r")[0][0].refused_reason is None

    def test_round_goes_through_its_states(self, training):
        self.accept(training, "t1")
        states = [
            training.start_aggregating("r", 0).state,
            training.start_evaluating("r", 0, state_digest=DIGEST).state,
            training.close_round("r", 0, metrics={"accuracy": 0.5}, examples=4).state,
        ]

        assert states == [RoundState.AGGREGATING, RoundState.EVALUATING, RoundState.CLOSED]
        assert training.round("r", 0).state_digest == DIGEST
        (evaluation,) = training.evaluations("r")
        assert (evaluation.source, json.loads(evaluation.metrics)) == ("server", {"accuracy": 0.5})

    def test_state_that_may_not_follow_changes_nothing(self, running):
        events = len(running.events("r"))

        with pytest.raises(TransitionError, match="closed may not follow assigning"):
            running.close_round("r", 0, metrics={"accuracy": 1.0})

        assert running.round("r", 0).state is RoundState.ASSIGNING
        assert running.evaluations("r") == []
        assert len(running.events("r")) == events

    def test_round_is_opened_once(self, training):
        assert training.open_round("r", 0).state is RoundState.TRAINING

    def test_device_gets_the_same_task_again(self, training):
        first = training.current_task("d1")

        assert training.current_task("d1").id == first.id == "t1"
        assert training.current_task("d2").id == "t2"
        assert training.current_task("d3") is None

    def test_update_is_counted_once(self, training):
        assert self.accept(training, "t1")
        assert not self.accept(training, "t1", digest="b" * 64)

        (update,) = training.updates("r", 0)
        assert update.digest == DIGEST
        assert training.task("t1").state is TaskState.DONE

    def test_update_after_the_round_is_refused(self, training):
        self.accept(training, "t1")
        training.start_aggregating("r", 0)

        with pytest.raises(RequestError) as caught:
            self.accept(training, "t2")

        assert caught.value.code is ErrorCode.ROUND_CLOSED
        assert training.task("t2").state is TaskState.EXPIRED
        assert len(training.updates("r", 0)) == 1

    def test_update_of_an_unknown_task_is_refused(self, training):
        with pytest.raises(RequestError) as caught:
            self.accept(training, "t9")

        assert caught.value.code is ErrorCode.TASK_UNKNOWN

    def test_lease_that_ended_is_granted_again_while_the_round_lasts(self, training):
        training.end_task("t1", TaskState.EXPIRED, message="silent")

        assert training.task("t1").state is TaskState.EXPIRED
        assert training.current_task("d1").id == "t1"
        assert training.task("t1").state is TaskState.OPEN

    def test_late_update_counts_once_although_the_work_was_handed_out_anew(self, training):
        training.end_task("t1", TaskState.EXPIRED)
        training.reassign("r", 0, reason="too few")
        training.start_training("r", 0, [task("t3", device="d1", attempt=1)])
        assert training.current_task("d1").id == "t3"

        assert self.accept(training, "t1")

        assert training.task("t3").state is TaskState.EXPIRED
        assert not training.is_wanted("t3")
        with pytest.raises(RequestError) as caught:
            self.accept(training, "t3")
        assert caught.value.code is ErrorCode.ROUND_CLOSED
        assert [u.task_id for u in training.updates("r", 0)] == ["t1"]

    def test_failed_task_stays_failed(self, training):
        assert training.end_task("t1", TaskState.FAILED, error="OutOfMemoryError", message="m")
        assert not training.end_task("t1", TaskState.EXPIRED)

        assert training.current_task("d1") is None
        assert training.task("t1").error == "OutOfMemoryError"

    def test_only_devices_that_ended_without_a_result_get_other_work(self, training):
        assert training.taken_devices("r", 0) == training.taken_devices("s", 0) == {"d1", "d2"}

        training.end_task("t1", TaskState.FAILED)
        training.end_task("t2", TaskState.EXPIRED)
        assert training.taken_devices("r", 0) == {"d2"}
        assert training.taken_devices("s", 0) == frozenset()

        self.accept(training, "t2")
        assert training.taken_devices("r", 0) == {"d2"}

    def test_nothing_is_wanted_of_a_run_stopped_at_once(self, training):
        training.request_stop("demo", at_once=True)

        assert not training.is_wanted("t1")
        assert training.current_task("d1") is None

    def test_stop_after_the_round_lets_the_round_go_on(self, training):
        training.request_stop("demo", at_once=False)

        assert training.is_wanted("t1")

    def test_end_of_a_run_leaves_no_open_round_or_task(self, training):
        training.end_run("r", RunState.FAILED, message="why")

        assert training.round("r", 0).state is RoundState.ABANDONED
        assert {t.state for t in training.tasks("r")} == {TaskState.EXPIRED}
        assert training.run("r").message == "why"
        assert training.current_task("d1") is None

    def test_evaluation_tasks_are_added_once(self, training):
        self.accept(training, "t1")
        training.start_aggregating("r", 0)
        training.start_evaluating("r", 0, state_digest=DIGEST)
        for _ in range(2):
            training.add_evaluation_tasks([task("e1", kind="evaluate")])

        assert training.current_task("d1").id == "e1"
        assert training.accept_evaluation("e1", metrics={"accuracy": 0.25}, examples=9)
        assert not training.accept_evaluation("e1", metrics={"accuracy": 0.75}, examples=9)
        (evaluation,) = training.evaluations("r")
        assert json.loads(evaluation.metrics) == {"accuracy": 0.25}

    def test_events_are_numbered_without_a_gap(self, training):
        self.accept(training, "t1")
        events = training.events("r")

        assert [e.sequence for e in events] == list(range(1, len(events) + 1))
        assert training.events("r", from_sequence=3, limit=2) == events[2:4]
        kinds = [e.kind for e in events]
        assert kinds[:3] == ["state", "device", "device"]
        assert kinds[-2:] == ["task", "update"]

    def test_result_is_kept_for_each_device(self, running):
        running.set_result(
            "r",
            "d2",
            package=(DIGEST, 7),
            adapter=("b" * 64, 9),
            inputs={"lora_scale": 2.0},
            max_length=64,
        )

        (member, run), *_ = running.memberships("d2")
        assert run.id == "r"
        assert (member.package_size, member.adapter_digest) == (7, "b" * 64)
        assert json.loads(member.inputs) == {"lora_scale": 2.0}

    def test_digests_in_use_are_known(self, training):
        self.accept(training, "t1", digest="c" * 64)
        assert training.referenced_digests() == {DIGEST, "c" * 64}

        training.start_aggregating("r", 0)
        training.start_evaluating("r", 0, state_digest="e" * 64)
        training.close_round("r", 0, metrics=None)

        assert training.referenced_digests() == {DIGEST, "e" * 64}

    def test_everything_is_there_after_a_restart(self, training, url):
        self.accept(training, "t1")
        training.close()
        again = SqlStore(url)

        assert again.round("r", 0).state is RoundState.TRAINING
        assert again.current_task("d2").plan == b"plan"
        assert len(again.updates("r", 0)) == 1
        again.close()

    def test_other_version_of_the_tables_is_refused(self, store, url):
        store.close()
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE meta SET value = '99'"))
        engine.dispose()

        with pytest.raises(StoreError, match="version 99"):
            SqlStore(url)

    def test_threads_that_accept_the_same_update_count_it_once(self, training):
        outcomes = []

        def accept():
            outcomes.append(self.accept(training, "t1"))

        threads = [threading.Thread(target=accept) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert sorted(outcomes) == [False, False, False, True]
        assert len(training.updates("r", 0)) == 1


class TestSqlite(StoreBehaviour):
    @pytest.fixture
    def url(self, tmp_path):
        return f"sqlite:///{tmp_path / 'test.sqlite'}"

    def test_writes_are_durable(self, url, store):
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


if "LORIKIT_TEST_DATABASE" in os.environ:  # a SQLAlchemy URL, for example postgresql+psycopg://...

    class TestOtherDatabase(StoreBehaviour):
        @pytest.fixture
        def url(self):
            url = os.environ["LORIKIT_TEST_DATABASE"]
            engine = create_engine(url)
            Table.metadata.drop_all(engine)
            engine.dispose()
            return url
