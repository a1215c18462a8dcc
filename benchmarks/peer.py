# SPDX-License-Identifier: Apache-2.0
"""A training step with torch + PEFT + bitsandbytes NF4, in a process of its own.

python benchmarks/peer.py MODEL --task causal-language-modeling --batch 1 --length 128
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

from lorikit.server.demo.processes import peak_memory

CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-language-modeling": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}


def step_cost(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and the process's peak resident bytes."""
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "lm_head"],
    )
    labels = {"num_labels": options.labels} if options.labels else {}
    base = getattr(transformers, CLASSES[options.task]).from_pretrained(
        options.model,
        quantization_config=quantised,
        dtype=torch.float32,  # CPUs are slow at half precision, which the folders are stored in
        ignore_mismatched_sizes=True,
        **labels,
    )
    if options.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=options.targets))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = _batch(options, base.config)
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"peak_memory_bytes": peak_memory(), "seconds": statistics.median(seconds)}


def _batch(options: argparse.Namespace, config: object) -> dict[str, torch.Tensor]:
    if options.task == "image-classification":
        size = config.image_size
        pixels = torch.rand(options.batch, 3, size, size)
        return {
            "pixel_values": pixels,
            "labels": torch.randint(0, options.labels, pixels.shape[:1]),
        }
    tokens = torch.randint(1, min(2000, config.vocab_size), (options.batch, options.length))
    if options.task == "causal-language-modeling":
        return {"input_ids": tokens, "labels": tokens}
    return {"input_ids": tokens, "labels": torch.randint(0, options.labels, tokens.shape[:1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", choices=CLASSES, required=True)
    parser.add_argument("--labels", type=int, default=0)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(step_cost(options)))


if __name__ == "__main__":
    main()
