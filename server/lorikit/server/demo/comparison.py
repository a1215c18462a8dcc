# SPDX-License-Identifier: Apache-2.0
"""What is measured with torch when a demo's run has ended, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lorikit.server.demo.baseline_task import BaselineTask
from lorikit.server.demo.data import DemoData, DemoError
from lorikit.server.demo.settings import DemoConfig

Say = Callable[[str], None]
"""Tells the user what is being done."""

TORCH_STEP_QUOTED: Mapping[str, Any] = {
    "peak_memory_bytes": 555_000_000,
    "label": "1 × 32 tokens, NF4",
    "note": "one step of 1 × 32 tokens, NF4 base, measured on two x86-64 cores",
    "measured": False,
}
"""What the torch stack takes where it is not measured anew."""


class Comparison:
    """Measurements that stand beside a finished run in its report."""

    def __init__(self, demo: DemoConfig, data: DemoData, report: Mapping[str, Any]) -> None:
        """Args are the demo, what it started from, and the run's report."""
        self._demo = demo
        self._config = data.config
        self._report = report
        task = BaselineTask.like(
            data.config, report, train=data.train, test=data.test, seconds=demo.baseline_seconds
        )
        self._task = demo.folder / "data" / "task.json"
        self._task.write_text(task.to_json(), encoding="utf-8")

    def measured_in_full(self, say: Say) -> dict[str, Any]:
        """The report with the final accuracy on the whole test set.

        Rounds are measured on part of it where the settings say so; the adapter that the run left
        is then measured on all of it, loaded by stock PEFT as a user would.
        """
        if self._demo.is_quick or not self._config.evaluate_rows:
            return dict(self._report)
        say("Measuring the adapter on the whole test set, loaded by stock PEFT.")
        return {**self._report, **self._full_measurement(self._config.name)}

    def torch_step(self, say: Say) -> Mapping[str, Any]:
        """Cost of a training step with torch + PEFT + bitsandbytes."""
        if self._demo.is_quick:
            return TORCH_STEP_QUOTED
        say("Measuring the same step with torch + PEFT + bitsandbytes.")
        length = self._demo.max_length
        cost = self._program(
            "lorikit.server.demo.torch_step",
            str(self._demo.model),
            *("--labels", str(len(self._config.labels)), "--batch", "1", "--length", str(length)),
        )
        return {
            **cost,
            "label": f"1 × {length} tokens, NF4",
            "note": f"one step of 1 × {length} tokens, NF4 base, measured here",
            "measured": True,
        }

    def baselines(self, uniform: Mapping[str, Any], say: Say) -> dict[str, Any]:
        """Centralised LoRA, a linear probe, and the run with one rank for all."""
        say("Baselines: a linear probe, and LoRA in one place with torch + PEFT.")
        central = self._program("lorikit.server.demo.baselines", str(self._task))
        return central | {"uniform": self._uniform_baseline(uniform)}

    def _uniform_baseline(self, report: Mapping[str, Any]) -> dict[str, Any]:
        entries = [entry for one in report["rounds"] for entry in one["devices"]]
        rank = self._config.min_rank
        metric = report["final_metric"]
        if self._config.evaluate_rows and not self._demo.is_quick:
            metric = self._full_measurement(report["name"])["final_metric"]
        return {
            "name": f"FedIT, rank {rank} for all",
            "metric": metric,
            "examples": sum(entry["examples"] for entry in entries if entry["trained_layers"]),
            "seconds": report["seconds"],
            "rounds": [one["metric"] for one in report["rounds"]],
            "note": "the same devices, each with the rank of the smallest; plain averaging",
        }

    def _full_measurement(self, run: str) -> dict[str, Any]:
        """Accuracy of a run's largest adapter on all test rows."""
        folders = (self._demo.folder / "server" / run / "adapter").iterdir()
        adapter = max(folders, key=lambda folder: int(folder.name.removeprefix("rank-")))
        found = self._program("lorikit.server.demo.evaluate", str(self._task), str(adapter))
        return {
            "final_metric": found["metric"],
            "final_metric_rows": found["rows"],
            "final_metric_source": f"adapter/{adapter.name} loaded by stock PEFT",
        }

    def _program(self, module: str, *arguments: str) -> dict[str, Any]:
        """What a program of ours prints; its own messages go to a log."""
        log = self._demo.folder / "data" / f"{module.rpartition('.')[2]}.log"
        with log.open("w", encoding="utf-8") as errors:
            done = subprocess.run(
                (sys.executable, "-m", module, *arguments),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                check=False,
            )
        if done.returncode:
            raise DemoError(f"{module} ended with exit code {done.returncode}; see {log}")
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result
