# SPDX-License-Identifier: Apache-2.0
"""A whole run of each method: real processes from the first call to the exported adapters."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.processes import LABELS, Server, make_devices

from lorikit.server.export import read_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    # transformers' own advice to callers of its older names, which PEFT still uses.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

METHODS = {
    "fedit": {},
    "hetlora": {"rank_rule": "budget"},
    "legend": {},
    "fedra": {"capacity": "budget"},
    "flexlora": {"rank_rule": "budget"},
    "frlora": {},
}
RANKS = {"hetlora": [2, 4, 8], "flexlora": [2, 4, 8]}
"""Rank classes that the limits below make; one, of rank 8, for the other methods."""
DEPTHS = {"legend": {1, 3}, "fedra": {1, 2, 3}}
"""Numbers of trained layers that the speeds and limits below make; all three for the others."""
LIMITS = ("200MB", "500MB", "1GB", "2GB")
SPEEDS = (1.0, 4.0, 8.0, 30.0)

RUN_FIELDS = {"method", "model", "task", "seed", "rounds", "baselines", "final_metric"}
ROUND_FIELDS = {"round", "metric", "loss", "seconds", "bytes_up", "bytes_down", "devices"}
DEVICE_FIELDS = {
    *("device", "class", "engine", "precision", "rank", "trained_layers", "kept_layers"),
    *("micro_batch", "peak_memory_bytes", "predicted_peak_memory_bytes", "seconds"),
    *("bytes_up", "bytes_down", "examples", "status"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")).start() as server:
        yield server


@pytest.mark.parametrize("method", METHODS)
def test_whole_run_of(method, server, run_settings, compiler, tiny_model, tmp_path):
    config = run_settings(
        name=method,
        method=method,
        method_options=METHODS[method],
        min_devices=4,
        min_updates=4,
    )
    server.create(config)
    with contextlib.ExitStack() as running:
        devices = make_devices(tmp_path, server.address, 4)
        for device, limit, speed in zip(devices, LIMITS, SPEEDS, strict=True):
            device.memory_limit, device.speed_gflops = limit, speed
            running.enter_context(device.start())
        summary = server.ended(method)
        codes = [device.process.wait() for device in devices]
        ready = [device.process.seen("AdapterReady") for device in devices]

    assert (summary.state, summary.round, codes) == ("finished", 2, [0, 0, 0, 0]), summary
    assert [len(events) for events in ready] == [1, 1, 1, 1]
    report = json.loads((server.run_folder(method) / "report.json").read_text())
    check_report(report, method)
    depths = {len(d["trained_layers"]) for entry in report["rounds"] for d in entry["devices"]}
    assert depths == DEPTHS.get(method, {3})
    texts, labels = evaluation_rows(config.evaluation_data)
    ranks = check_adapters(server.run_folder(method), tiny_model, compiler, texts)
    assert ranks == RANKS.get(method, [8])
    logits = peft_logits(server.run_folder(method) / "adapter" / "rank-8", tiny_model)(texts)
    chosen = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -chosen[np.arange(len(labels)), labels].mean()
    assert report["rounds"][-1]["loss"] == pytest.approx(loss, abs=1e-4)
    assert report["final_metric"] == np.mean(logits.argmax(axis=1) == labels)


def check_report(report: dict[str, Any], method: str) -> None:
    """Complete as the design has it, and no number contradicts another."""
    assert report.keys() >= RUN_FIELDS
    assert (report["method"], report["state"], report["seed"]) == (method, "finished", 7)
    assert [entry["round"] for entry in report["rounds"]] == [0, 1]
    assert report["final_metric"] == report["rounds"][-1]["metric"]
    for entry in report["rounds"]:
        assert entry.keys() >= ROUND_FIELDS
        assert 0 <= entry["metric"] <= 1
        assert math.isfinite(entry["loss"])
        assert entry["seconds"] > 0
        assert len({device["device"] for device in entry["devices"]}) == 4
        for side in ("bytes_up", "bytes_down"):
            assert entry[side] == sum(device[side] for device in entry["devices"]) > 0
        for device in entry["devices"]:
            check_device(device)


def check_device(device: dict[str, Any]) -> None:
    assert device.keys() >= DEVICE_FIELDS
    assert device["status"] == "done"
    assert device["engine"] == "onnx"
    assert device["class"] in {f"device-{number}" for number in range(4)}
    assert device["precision"] in ("fp32", "fp16", "int8", "nf4")
    assert 1 <= device["rank"] <= device["assigned_rank"] <= 8
    assert set(device["trained_layers"]) <= set(device["kept_layers"]) <= {0, 1, 2}
    assert device["trained_layers"]
    assert 1 <= device["micro_batch"] <= 8
    assert device["examples"] == 4 * 8
    assert 0 < device["predicted_peak_memory_bytes"] < 2e9
    assert 0 < device["peak_memory_bytes"] < 2e9
    assert device["seconds"] > 0
    assert device["bytes_up"] > 0


def check_adapters(folder: Path, model: Path, compiler: Any, texts: list[str]) -> list[int]:
    """Each exported folder computes in stock PEFT what the server computes; the ranks in use."""
    folders = sorted(folder.glob("adapters/round-*/rank-*")) + sorted(folder.glob("adapter/rank-*"))
    rounds = {path.parent.name for path in folders}
    assert rounds == {"adapter", "round-0000", "round-0001"}
    for path in folders:
        exported = read_adapter(path)
        theirs = peft_logits(path, model)(texts)
        ours = compiler.logits(exported.tensors, texts, lora_scale=2.0, max_length=16)
        np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0, err_msg=str(path))
        assert exported.labels == LABELS
    return sorted(int(path.name.removeprefix("rank-")) for path in folder.glob("adapter/rank-*"))


def peft_logits(folder: Path, model: Path):
    """What somebody who has only PEFT gets; a missing or unexpected key would be a warning."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(LABELS)
    )
    adapted = peft.PeftModel.from_pretrained(base, folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), pad_token="[PAD]"
    )

    def logits(texts: list[str]):
        rows = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            return adapted(
                input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]
            ).logits.numpy()

    return logits


def evaluation_rows(path: Path) -> tuple[list[str], list[int]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["text"] for row in rows], [LABELS.index(row["label"]) for row in rows]
