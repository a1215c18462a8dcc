# SPDX-License-Identifier: Apache-2.0
"""Later runs plan with what the devices of earlier ones measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.server.federation import (
    crowd,
    open_tiny_parts,
    run_config,
    server_config,
    start_server,
)

from lorikit.server.learning import LearntMemory, Observation

HEAVIER = Observation(device_class="phone", predicted_bytes=100e6, measured_bytes=105e6)


def test_a_later_run_knows_what_an_earlier_one_measured(tmp_path: Path) -> None:
    learnt = LearntMemory(tmp_path)
    assert learnt.for_run("first").factor("phone") == 1

    learnt.teach([HEAVIER])

    assert learnt.for_run("second").factor("phone") == pytest.approx(1.05)
    assert learnt.for_run("second").factor("tablet") == 1


def test_a_run_keeps_what_was_known_when_it_began(tmp_path: Path) -> None:
    LearntMemory(tmp_path).for_run("long")

    LearntMemory(tmp_path).teach([HEAVIER])

    assert LearntMemory(tmp_path).for_run("long").factor("phone") == 1


def test_a_damaged_file_is_no_reason_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learnt = LearntMemory(tmp_path)
    learnt.teach([HEAVIER])
    (tmp_path / "corrections.json").write_text('{"phone": [9, 1]}')

    assert learnt.for_run("next").factor("phone") == 1
    assert "start anew" in caplog.text


def test_a_run_teaches_what_its_devices_measured(tmp_path: Path) -> None:
    heard: list[Observation] = []

    def parts(config, blobs):
        return dataclasses.replace(open_tiny_parts(config, blobs), teach=heard.extend)

    with start_server(server_config(tmp_path / "runs"), open_parts=parts) as server:
        server.create_run(run_config(tmp_path, rounds=2))
        with crowd(server.address) as devices:
            server.wait("test", timeout=40)
            devices.join()

    assert len(heard) == 6
    assert {observation.device_class for observation in heard} == {"20mb", "40mb"}
    assert {observation.predicted_bytes for observation in heard} == {5 * 2**20}
