# SPDX-License-Identifier: Apache-2.0
"""What a demo adds to its run's report, and the three sentences it ends with. All of it is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorikit.server.demo.devices import Supervised
from lorikit.server.demo.settings import DemoClass

Report = Mapping[str, Any]


def complete_report(
    report: Report,
    *,
    devices: Mapping[str, DemoClass],
    names: Mapping[str, str],
    supervised: Mapping[str, Supervised],
    torch_step: Mapping[str, Any],
    baselines: Mapping[str, Any],
) -> dict[str, Any]:
    """The run's report with what the demo knows besides.

    Args:
        report: ``report.json`` as the server wrote it.
        devices: Class of each device by the demo's names.
        names: The demo's name by the server's identity of a device.
        supervised: What was seen of each process from outside.
        torch_step: Cost of a step with torch, see ``torch_step``.
        baselines: Results by name.
    """
    complete = {
        **report,
        "device_names": dict(names),
        "device_classes": {
            kind.name: {"memory_limit_bytes": kind.memory_limit_bytes} for kind in devices.values()
        },
        "supervision": {
            name: {
                "limit_bytes": seen.limit_bytes,
                "peak_memory_bytes": seen.peak_bytes,
                "killed": seen.was_killed,
            }
            for name, seen in supervised.items()
        },
        "torch_step": dict(torch_step),
        "baselines": dict(baselines),
    }
    return complete | {"sentences": list(closing_sentences(complete))}


def closing_sentences(report: Report) -> tuple[str, str, str]:
    """Accuracy, memory and traffic, each as a sentence for a colleague."""
    return (_accuracy_sentence(report), _memory_sentence(report), _traffic_sentence(report))


def peak_by_class(report: Report) -> dict[str, float]:
    """Largest peak memory of any device of a class, bytes, smallest budget first.

    The kernel's figure as the supervisor saw it counts as well as the device's own.
    """
    seen = {
        name: report.get("supervision", {}).get(own, {}).get("peak_memory_bytes") or 0
        for name, own in report.get("device_names", {}).items()
    }
    peaks: dict[str, float] = {}
    for entry in _entries(report):
        own = max(entry.get("peak_memory_bytes") or 0, seen.get(entry["device"], 0))
        peaks[entry["class"]] = max(peaks.get(entry["class"], 0), own)
    budgets = report.get("device_classes", {})
    order = sorted(peaks, key=lambda name: budgets.get(name, {}).get("memory_limit_bytes", 0))
    return {name: peaks[name] for name in order}


def _accuracy_sentence(report: Report) -> str:
    final = report.get("final_metric")
    devices = {entry["device"] for entry in _entries(report)}
    rounds = len(report["rounds"])
    if final is None:
        return f"{len(devices)} devices trained together for {rounds} rounds; nothing was measured."
    text = (
        f"{len(devices)} devices, each with a mix of topics of its own, "
        f"reached {100 * final:.1f} % accuracy on {report['labels']} intents in {rounds} rounds"
    )
    baseline = report.get("baselines", {}).get("centralised") or {}
    central = baseline.get("metric")
    if not central or not baseline.get("is_complete", True):
        return text + "."
    return (
        f"{text}: {100 * final / central:.1f} % of the {100 * central:.1f} % of centralised "
        "training that sees as many examples."
    )


def _memory_sentence(report: Report) -> str:
    budgets = report.get("device_classes", {})
    parts = [
        f"{peak / 1e6:.0f} MB of {budgets.get(name, {}).get('memory_limit_bytes', 0) / 1e6:,.0f} "
        f"({name})"
        for name, peak in peak_by_class(report).items()
    ]
    text = f"Training peaked at {_listed(parts)} for the whole process"
    torch = report.get("torch_step", {}).get("peak_memory_bytes")
    if not torch:
        return text + "."
    note = report["torch_step"].get("note", "one step")
    return f"{text}; torch + PEFT + bitsandbytes takes {torch / 1e6:.0f} MB ({note})."


def _traffic_sentence(report: Report) -> str:
    entries = list(_entries(report))
    count = max(len({entry["device"] for entry in entries}), 1)
    up = sum(entry.get("bytes_up") or 0 for entry in entries) / count
    down = sum(entry.get("bytes_down") or 0 for entry in entries) / count
    return (
        f"A device sent {up / 1e6:.1f} MB and received {down / 1e6:.1f} MB in all, the base model "
        "included, and not one of its texts left it."
    )


def _entries(report: Report) -> Sequence[Mapping[str, Any]]:
    return [entry for one in report["rounds"] for entry in one["devices"]]


def _listed(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
