# SPDX-License-Identifier: Apache-2.0
"""What a training step costs with torch + PEFT + bitsandbytes: the stack devices do without.

Run as a program, so that the operating system's figure is that of this stack alone:
``python -m lorikit.server.demo.torch_step MODEL --labels 150 --batch 1 --length 32``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from lorikit.server.demo.processes import peak_memory


def step_cost(
    model_folder: Path, *, labels: int, batch: int, length: int, rank: int = 8, steps: int = 5
) -> dict[str, float]:
    """Train a few steps with an NF4 base on random tokens and read what they cost.

    Args:
        model_folder: Hugging Face folder of an encoder with query and value projections.
        labels: Number of classes.
        batch: Examples per step.
        length: Tokens per example.
        rank: LoRA rank on query and value.
        steps: Steps; the median time is given.

    Returns:
        ``peak_memory_bytes`` of this whole process since it started, and ``seconds`` of a step.
    """
    quantised = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers leaves it so
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        model_folder, num_labels=labels, quantization_config=quantised
    )
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules=["query", "value"]
    )
    model = get_peft_model(base, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    tokens = torch.randint(1000, 2000, (batch, length))
    classes = torch.randint(0, labels, (batch,))
    model.train()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        model(input_ids=tokens, labels=classes).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"peak_memory_bytes": peak_memory(), "seconds": statistics.median(seconds)}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cost = step_cost(
        options.model, labels=options.labels, batch=options.batch, length=options.length
    )
    print(json.dumps(cost))


if __name__ == "__main__":
    _main()
