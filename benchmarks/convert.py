# SPDX-License-Identifier: Apache-2.0
"""Converting a 1.1 B-parameter folder: speed, peak memory, and going on after a kill.

Writes a folder of random fp16 weights in the shapes of TinyLlama 1.1 B, five shards, runs ``lorikit
quantize`` on it in a process of its own for each target, and once more with a kill in the middle.

    python benchmarks/convert.py [--folder FOLDER] [--targets nf4 int4] [--output FILE]

Processor seconds are those of the whole command, errors of every tensor included; megabytes a
second are fp16 bytes by wall clock, and by processor time on two cores as a machine that does
nothing else would give them at best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, LAYERS, VOCABULARY, KEYS = 2048, 5632, 22, 32000, 256
SHARDS = 5
CORES = 2


def shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Tensors of the model by name, in order."""
    named: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        named += [
            (f"{at}.input_layernorm.weight", (HIDDEN,)),
            (f"{at}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
            (f"{at}.self_attn.k_proj.weight", (KEYS, HIDDEN)),
            (f"{at}.self_attn.v_proj.weight", (KEYS, HIDDEN)),
            (f"{at}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
            (f"{at}.post_attention_layernorm.weight", (HIDDEN,)),
            (f"{at}.mlp.gate_proj.weight", (INNER, HIDDEN)),
            (f"{at}.mlp.up_proj.weight", (INNER, HIDDEN)),
            (f"{at}.mlp.down_proj.weight", (HIDDEN, INNER)),
        ]
    return [*named, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]


def write_model(folder: Path, layers: int) -> int:
    """Random weights in fp16 shards; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = shapes(layers)
    per_shard = -(-len(tensors) // SHARDS)
    total, index = 0, {}
    for number in range(SHARDS):
        own = tensors[number * per_shard : (number + 1) * per_shard]
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        total += write_shard(folder / name, own, number)
        index |= {tensor: name for tensor, _ in own}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int) -> int:
    header, end = {}, 0
    for name, shape in tensors:
        length = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + length]}
        end += length
    if path.exists():
        return end
    rng = np.random.default_rng(seed)
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            file.write(values.astype(np.float16).tobytes())
    partial.replace(path)
    return end


def command(model: Path, target: str, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "lorikit.server.cli", "quantize", str(model), "--to", target,
        "--out", str(out), "--format", "json",
    ]  # fmt: skip


def convert(model: Path, target: str, out: Path, source_bytes: int) -> dict[str, Any]:
    """One conversion from nothing."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    process = subprocess.Popen(command(model, target, out), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text
    wall, cpu = time.monotonic() - started, usage.ru_utime + usage.ru_stime
    report = json.loads(text)["targets"][0]
    matrices = next(row for row in report["classes"] if row["class"] == "matrix")
    return {
        "target": target,
        "source_bytes": source_bytes,
        "bytes": report["bytes"],
        "processor_seconds": cpu,
        "seconds": wall,
        "megabytes_per_second": source_bytes / 1e6 / wall,
        "megabytes_per_second_by_processor_time": CORES * source_bytes / 1e6 / cpu,
        "peak_memory_bytes": 1024 * usage.ru_maxrss,
        "sqnr_db": matrices["sqnr_db"],
    }


def restarted(model: Path, target: str, out: Path) -> dict[str, Any]:
    """A conversion killed when about half of it is there, and started again."""
    whole = {path.name: path.stat().st_size for path in (out / codec_of(out)).iterdir()}
    half = sum(whole.values()) / 2
    shutil.rmtree(out)
    process = subprocess.Popen(command(model, target, out), stdout=subprocess.DEVNULL)
    while process.poll() is None and size_of(out) < half:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = size_of(out)
    done = subprocess.run(
        command(model, target, out), stdout=subprocess.PIPE, text=True, check=True
    )
    report = json.loads(done.stdout)["targets"][0]
    again = {path.name: path.stat().st_size for path in (out / codec_of(out)).iterdir()}
    return {
        "bytes_at_kill": left,
        "tensors_taken_up": report["tensors_taken_up"],
        "seconds_after": report["seconds"],
        "same_files": again == whole,
    }


def codec_of(out: Path) -> str:
    return next(path.name for path in out.iterdir() if path.is_dir())


def size_of(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("convert-benchmark"))
    parser.add_argument("--targets", nargs="*", default=["nf4", "int4"])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--output", type=Path, default=Path("docs/results/convert.json"))
    options = parser.parse_args()
    model = options.folder / f"model-{options.layers}"
    source = write_model(model, options.layers)
    report: dict[str, Any] = {
        "command": "python benchmarks/convert.py",
        "parameters": sum(int(np.prod(shape)) for _, shape in shapes(options.layers)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start",
        "rows": [],
    }
    for target in options.targets:
        out = options.folder / target
        row = convert(model, target, out, source)
        row["restart"] = restarted(model, target, out)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
