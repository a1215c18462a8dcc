# SPDX-License-Identifier: Apache-2.0
"""Measures a finished run's adapter on the whole test set, loaded by stock PEFT as a user would.

Run as a program: ``python -m lorikit.server.demo.evaluate TASK.json ADAPTER_FOLDER`` prints the
accuracy as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft import PeftModel

from lorikit.server.demo.baseline_task import BaselineTask
from lorikit.server.demo.baselines import EncoderClassifier, read_rows


def adapter_accuracy(task: BaselineTask, adapter: Path) -> dict[str, float]:
    """Accuracy of the base model with the adapter on the test rows, and their number."""
    encoder = EncoderClassifier(task)
    encoder.model = PeftModel.from_pretrained(encoder.model, adapter)
    test = read_rows(task.test, task)
    return {"metric": encoder.accuracy(test), "rows": len(test.texts)}


def main() -> None:
    """Read a task and an adapter folder, print what the adapter reaches."""
    task = BaselineTask.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(adapter_accuracy(task, Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
