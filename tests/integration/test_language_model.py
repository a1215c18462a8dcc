# SPDX-License-Identifier: Apache-2.0
"""A language model, from its folder to texts that a device continues with what all learnt."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from tests.server.compile.tiny_llama import write_tiny_llama

from lorikit.sdk import Client
from lorikit.server.app import RunConfig, Server

pytestmark = pytest.mark.slow

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 4


@pytest.mark.parametrize(
    ("method", "adapter", "folder"),
    [("hetlora", "lora", "rank-8"), ("fedit", "prompt", "rank-8"), ("fedit", "dora", "rank-8")],
)
def test_devices_train_a_language_model_and_continue_texts(
    tmp_path: Path, method: str, adapter: str, folder: str
) -> None:
    model = write_tiny_llama(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    run = RunConfig(
        name="stories",
        model=model,
        task_kind="causal-language-modeling",
        method=method,
        adapter=adapter,
        adapter_size=3,
        evaluation_data=rows,
        rounds=2,
        local_steps=3,
        batch_size=4,
        max_length=12,
        min_devices=2,
    )
    results: dict[int, float] = {}
    texts: dict[int, str] = {}

    def take_part(number: int) -> None:
        store = tmp_path / f"device-{number}"
        with Client(server.address, TEXTS, store=store, insecure=True) as client:
            client.run()
            results[number] = client.evaluate(TEXTS)["perplexity"]
            if adapter != "prompt":
                (answer,) = client.generate(["the cat"], max_new_tokens=4, seed=1)
                texts[number] = answer.text

    with Server(folder=tmp_path / "runs", address="localhost:0", insecure=True) as server:
        created = server.create_run(run)
        devices = [threading.Thread(target=take_part, args=(number,)) for number in range(2)]
        for device in devices:
            device.start()
        summary = server.wait(created.name, timeout=240)
        for device in devices:
            device.join(120)

    report = json.loads((tmp_path / "runs" / "stories" / "report.json").read_text())
    losses = [entry["loss"] for entry in report["rounds"]]
    assert summary.state == "finished"
    assert losses[-1] < losses[0]
    assert results[0] == results[1]
    assert len(texts) == (0 if adapter == "prompt" else 2)
    assert (tmp_path / "runs" / "stories" / "adapter" / folder / "adapter_config.json").is_file()
