# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import logging
import threading

import pytest

from lorikit.sdk import _events
from lorikit.sdk._events import Event, Progress, Refused, State, StateChanged
from lorikit.sdk._feed import Feed


def refused(number: int) -> Refused:
    return Refused(reason=str(number), remedy="")


def test_callback_gets_events_in_order() -> None:
    seen: list[Event] = []
    feed = Feed(seen.append)

    feed.emit(refused(1))
    feed.enter(State.TRAINING)
    feed.enter(State.TRAINING)

    assert seen == [refused(1), StateChanged(state=State.TRAINING)]
    assert feed.state is State.TRAINING


def test_every_reader_gets_every_event_until_the_end() -> None:
    feed = Feed()
    readers = [feed.events(), feed.events()]

    feed.emit(refused(1))
    feed.emit(refused(2))
    feed.end()

    assert [list(reader) for reader in readers] == [[refused(1), refused(2)]] * 2


def test_reader_waits_for_events_of_another_thread() -> None:
    feed = Feed()
    reader = feed.events()
    thread = threading.Thread(target=lambda: (feed.emit(refused(1)), feed.end()))

    thread.start()

    assert list(reader) == [refused(1)]
    thread.join()


def test_slow_reader_loses_the_oldest_events_and_memory_stays_bounded() -> None:
    feed = Feed()
    reader = feed.events()

    for number in range(5000):
        feed.emit(refused(number))
    feed.end()

    seen = [int(event.reason) for event in reader if isinstance(event, Refused)]
    assert seen == list(range(5000 - len(seen), 5000))
    assert len(seen) == 4095


def test_failing_callback_costs_nothing_but_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("the app's fault")

    feed = Feed(fail)
    reader = feed.events()

    with caplog.at_level(logging.ERROR):
        feed.emit(refused(1))
    feed.end()

    assert list(reader) == [refused(1)]
    assert "the app's on_event failed" in caplog.text


def test_events_are_immutable_and_plain() -> None:
    kinds = [k for k in vars(_events).values() if isinstance(k, type) and issubclass(k, Event)]

    assert len(kinds) > 10
    for kind in kinds:
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]  # dataclasses' own
    event = Progress(task_id="t", phase="train", step=1, steps=2, loss=0.5)
    assert json.loads(json.dumps(dataclasses.asdict(event)))["loss"] == 0.5
    assert json.dumps(dataclasses.asdict(StateChanged(state=State.IDLE))) == '{"state": "idle"}'
