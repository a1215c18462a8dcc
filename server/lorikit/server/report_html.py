# SPDX-License-Identifier: Apache-2.0
"""A run's ``report.json`` as one page that opens in a browser without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

from lorikit.server.methods import FACTS
from lorikit.server.report_charts import (
    Curve,
    LayerRow,
    Level,
    MemoryRow,
    accuracy_chart,
    bytes_chart,
    layer_chart,
    memory_chart,
)
from lorikit.server.report_drift import drift_chart, drift_rows

Report = Mapping[str, Any]
"""The content of ``report.json``; unknown fields are ignored, optional ones may be absent."""

_TEMPLATE = "report_template.html"


@dataclass(slots=True, kw_only=True)
class _Device:
    """One device over all its rounds."""

    name: str
    device_class: str
    entries: list[Mapping[str, Any]] = field(default_factory=list)

    def largest(self, key: str) -> float:
        """Largest value of a number over the rounds; zero where it is never given."""
        return max((entry.get(key) or 0 for entry in self.entries), default=0)

    def total(self, key: str) -> float:
        """Sum of a number over the rounds."""
        return sum(entry.get(key) or 0 for entry in self.entries)

    def last(self, key: str) -> object:
        """Newest value that is not empty, or a dash."""
        values = [entry.get(key) for entry in self.entries]
        return next((value for value in reversed(values) if value not in (None, "", 0, [])), "-")

    def trained(self) -> list[Mapping[str, Any]]:
        """The rounds in which layers were trained."""
        return [entry for entry in self.entries if entry.get("trained_layers")]


def render(report: Report) -> str:
    """The page: summary, pictures and tables of a run, nothing loaded from elsewhere.

    Args:
        report: Content of ``report.json``; a run without finished rounds gives a page that says so.
    """
    template = resources.files("lorikit.server").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    devices = _devices(report)
    model = str(report.get("model", "")).rstrip("/").rpartition("/")[2]
    return Template(template).substitute(
        title=escape(f"{report.get('name') or model}: {report.get('method', '')}"),
        heading=escape(_heading(report, model)),
        facts=escape(_fact_line(report, devices)),
        sentences="".join(f"<p>{escape(text)}</p>" for text in report.get("sentences", ())),
        tiles="".join(_tiles(report, devices)),
        sections="".join(_sections(report, devices)) or "<p>No round has finished yet.</p>",
    )


def _heading(report: Report, model: str) -> str:
    method = str(report.get("method", ""))
    title = FACTS[method].title if method in FACTS else method
    return f"{model or 'Model'} tuned with {title}"


def _fact_line(report: Report, devices: Sequence[_Device]) -> str:
    task = report.get("task")
    if isinstance(task, Mapping):
        task = f"{task.get('kind', '')}, {len(task.get('labels', ()))} classes"
    rounds = len(report.get("rounds", ()))
    facts = [
        f"{rounds} round{'s' * (rounds != 1)}",
        f"{len(devices)} devices in {len({d.device_class for d in devices})} classes",
        str(task or ""),
        f"seed {report.get('seed')}",
    ]
    return " · ".join(fact for fact in facts if fact)


def _tiles(report: Report, devices: Sequence[_Device]) -> list[str]:
    tiles = []
    final = report.get("final_metric")
    if final is not None:
        central = _baseline_metric(report, "centralised")
        note = f"{100 * final / central:.1f} % of centralised" if central else "on the test set"
        tiles.append(_tile(f"{100 * final:.1f} %", "accuracy", note))
    peaks = [device.largest("peak_memory_bytes") for device in devices]
    known = [peak for peak in peaks if peak]
    if known:
        torch = (report.get("torch_step") or {}).get("peak_memory_bytes")
        note = f"torch stack: {torch / 1e6:,.0f} MB" if torch else "whole process, from the system"
        tiles.append(_tile(f"{min(known) / 1e6:,.0f} MB", "least peak memory of a device", note))
    if devices:
        up = sum(device.total("bytes_up") for device in devices) / len(devices)
        down = sum(device.total("bytes_down") for device in devices) / len(devices)
        tiles.append(
            _tile(f"{up / 1e6:,.1f} MB", "sent by a device", f"{down / 1e6:,.1f} MB received")
        )
    seconds = sum(entry.get("seconds") or 0 for entry in report.get("rounds", ()))
    if seconds:
        tiles.append(_tile(_duration(seconds), "in rounds", f"{len(devices)} devices, one server"))
    return tiles


def _sections(report: Report, devices: Sequence[_Device]) -> list[str]:
    rounds = report.get("rounds", ())
    if not rounds:
        return []
    numbers = [int(entry["round"]) for entry in rounds]
    columns = [
        bytes_chart(
            numbers, [entry.get(f"bytes_{way}") or 0 for entry in rounds], style=way, title=title
        )
        for way, title in (("up", "sent by devices"), ("down", "received by devices"))
    ]
    return [
        _section("Accuracy per round", _accuracy_note(report), _accuracy(report)),
        _section(
            "Peak memory per device class",
            "The operating system's figure for the whole process (bar), what the server predicted "
            "before it sent the plan (mark), and the budget that was enforced (line).",
            _LEGEND_OF_MEMORY + memory_chart(_memory_rows(report, devices)),
        ),
        _section(
            "Bytes per round",
            "All devices together. The base model travels once, in the first round of a device; "
            "after that only adapters do. The two scales differ.",
            '<div class="pair">'
            f"{_figure('Sent', columns[0])}{_figure('Received', columns[1])}</div>",
        ),
        _section(
            "Who trained what",
            "The number is the LoRA rank, the deeper the colour the higher; a smaller square means "
            "that the layer was trained in some of the device's rounds. Pale squares: held, not "
            "trained. Dotted: not in that device's model.",
            layer_chart(_layer_rows(devices), layers=_layer_count(report, devices)),
        ),
        *_drift_section(report),
        _section("Devices", "", _device_table(report, devices)),
        _section("Rounds", "", _round_table(rounds)),
        *_baseline_section(report),
    ]


def _drift_section(report: Report) -> list[str]:
    """Bases of different precisions, where a run has them."""
    rows = drift_rows(report.get("rounds", ()))
    if len(rows) < 2:
        return []
    return [
        _section(
            "Bases of different precisions",
            "Means over the rounds. Left: how far the base's outputs are from the exact ones. "
            "Middle: how much of the adapter undoes that instead of learning the task. Right: how "
            "far the devices' mean update stands from that of all, by their weight.",
            _LEGEND_OF_DRIFT + drift_chart(rows),
        )
    ]


_LEGEND_OF_DRIFT = (
    '<p class="keys"><span class="key reference"></span>before correction'
    '<span class="key measured"></span>after correction</p>'
)

_LEGEND_OF_MEMORY = (
    '<p class="keys"><span class="key measured"></span>measured peak'
    '<span class="key predicted"></span>predicted peak'
    '<span class="key budget"></span>budget'
    '<span class="key reference"></span>torch + PEFT</p>'
)


def _accuracy_note(report: Report) -> str:
    rows = (report.get("config") or {}).get("evaluate_rows") or 0
    part = f" on {rows:,} of its rows" if rows else ""
    note = f"Measured by the server on the test set{part}, with the aggregated adapter."
    if report.get("final_metric_rows"):
        note += f" The figure above is for all {report['final_metric_rows']:,} rows."
    if report.get("baselines"):
        note += " Dashed and grey: what other ways of training reached with the same data."
    return note


def _accuracy(report: Report) -> str:
    measured = [e for e in report.get("rounds", ()) if e.get("metric") is not None]
    curves = [
        Curve(
            name="this run",
            values=[float(entry["metric"]) for entry in measured],
            rounds=[int(entry["round"]) for entry in measured],
            style="main",
        )
    ]
    levels = []
    for key, baseline in (report.get("baselines") or {}).items():
        name = str(baseline.get("name", key))
        name += "" if baseline.get("is_complete", True) else " (cut short)"
        series = baseline.get("rounds") or []
        if series:
            values = [float(value) for value in series]
            numbers = list(range(len(values)))
            curves.append(Curve(name=name, values=values, rounds=numbers, style="other"))
        elif baseline.get("metric") is not None:
            levels.append(Level(name=name, value=float(baseline["metric"])))
    return accuracy_chart(curves, levels)


def _memory_rows(report: Report, devices: Sequence[_Device]) -> list[MemoryRow]:
    budgets = report.get("device_classes") or {}
    rows = []
    for name in _classes(report, devices):
        members = [device for device in devices if device.device_class == name]
        budget = (budgets.get(name) or {}).get("memory_limit_bytes") or 0
        note = f"{len(members)} × {members[0].last('precision')}, micro-batch "
        rows.append(
            MemoryRow(
                name=name,
                note=note + str(members[0].last("micro_batch")),
                measured=max(device.largest("peak_memory_bytes") for device in members),
                predicted=max(device.largest("predicted_peak_memory_bytes") for device in members),
                budget=budget,
            )
        )
    torch = report.get("torch_step") or {}
    if torch.get("peak_memory_bytes"):
        rows.append(
            MemoryRow(
                name="torch + PEFT",
                note=str(torch.get("label", "the same step")),
                measured=torch["peak_memory_bytes"],
                style="reference",
            )
        )
    return rows


def _layer_rows(devices: Sequence[_Device]) -> list[LayerRow]:
    rows = []
    for device in devices:
        rounds = device.trained()
        times: dict[int, int] = {}
        ranks: dict[int, int] = {}
        for entry in rounds:
            own = entry.get("ranks") or {}
            for layer in entry["trained_layers"]:
                times[layer] = times.get(layer, 0) + 1
                rank = int(own.get(str(layer), entry.get("rank") or 0))
                ranks[layer] = max(ranks.get(layer, 0), rank)
        held = {layer for entry in device.entries for layer in entry.get("kept_layers") or ()}
        rows.append(
            LayerRow(
                name=device.name,
                note=device.device_class,
                share={layer: count / len(rounds) for layer, count in times.items()},
                rank=ranks,
                held=frozenset(held),
            )
        )
    return rows


def _device_table(report: Report, devices: Sequence[_Device]) -> str:
    header = (
        "device", "class", "engine", "base", "rank", "layers", "batch", "peak", "predicted",
        "s/round", "sent", "received", "examples", "updates",
    )  # fmt: skip
    rows = [
        (
            device.name,
            device.device_class,
            device.last("engine"),
            device.last("precision"),
            device.last("rank"),
            _layers(device.last("trained_layers")),
            device.last("micro_batch"),
            _megabytes(device.largest("peak_memory_bytes")),
            _megabytes(device.largest("predicted_peak_memory_bytes")),
            f"{device.total('seconds') / max(len(device.entries), 1):.1f}",
            _size(device.total("bytes_up")),
            _size(device.total("bytes_down")),
            f"{device.total('examples'):,.0f}",
            _updates(device),
        )
        for device in devices
    ]
    return _table(header, rows, text_columns=4)


def _round_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            entry["round"] + 1,
            _percent(entry.get("metric")),
            "-" if entry.get("loss") is None else f"{entry['loss']:.3f}",
            f"{entry.get('seconds') or 0:.1f}",
            f"{sum(_is_counted(device) for device in entry['devices'])} of {len(entry['devices'])}",
            _size(entry.get("bytes_up") or 0),
            _size(entry.get("bytes_down") or 0),
        )
        for entry in rounds
    ]
    header = ("round", "accuracy", "loss", "seconds", "updates counted", "sent", "received")
    return f"<details><summary>Show all rounds</summary>{_table(header, rows)}</details>"


def _baseline_section(report: Report) -> list[str]:
    baselines = report.get("baselines") or {}
    if not baselines:
        return []
    rows = [
        (
            str(baseline.get("name", key)),
            _percent(baseline.get("metric")),
            f"{baseline.get('examples') or 0:,}",
            f"{baseline.get('seconds') or 0:.0f}",
            str(baseline.get("note", "")),
        )
        for key, baseline in baselines.items()
    ]
    header = ("baseline", "accuracy", "examples seen", "seconds", "how")
    return [_section("Baselines", "", _table(header, rows, notes=True))]


def _devices(report: Report) -> list[_Device]:
    """Devices by class in the order of their budget, then by name."""
    names = report.get("device_names") or {}
    found: dict[str, _Device] = {}
    for entry in report.get("rounds", ()):
        for item in entry["devices"]:
            name = str(names.get(item["device"], item["device"]))
            device = found.setdefault(
                name, _Device(name=name, device_class=str(item.get("class") or ""))
            )
            device.entries.append(item)
    order = {name: index for index, name in enumerate(_classes(report, list(found.values())))}
    return sorted(found.values(), key=lambda device: (order[device.device_class], device.name))


def _classes(report: Report, devices: Sequence[_Device]) -> list[str]:
    budgets = report.get("device_classes") or {}
    names = {device.device_class for device in devices}

    def by_budget(name: str) -> tuple[float, str]:
        return ((budgets.get(name) or {}).get("memory_limit_bytes") or 0, name)

    return sorted(names, key=by_budget)


def _layer_count(report: Report, devices: Sequence[_Device]) -> int:
    highest = max(
        (
            layer
            for device in devices
            for entry in device.entries
            for key in ("trained_layers", "kept_layers")
            for layer in entry.get(key) or ()
        ),
        default=-1,
    )
    return int(report.get("layer_count") or highest + 1)


def _baseline_metric(report: Report, key: str) -> float | None:
    """What a baseline reached; None where there is none, or it was cut short."""
    baseline = (report.get("baselines") or {}).get(key) or {}
    if baseline.get("metric") is None or not baseline.get("is_complete", True):
        return None
    return float(baseline["metric"])


def _is_counted(device: Mapping[str, Any]) -> bool:
    return device.get("status") in ("accepted", "counted", "finished", "done")


def _updates(device: _Device) -> str:
    return f"{sum(map(_is_counted, device.entries))} of {len(device.entries)}"


def _section(title: str, note: str, content: str) -> str:
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section><h2>{escape(title)}</h2>{lead}<div class="scroll">{content}</div></section>'


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"


def _tile(value: str, label: str, note: str) -> str:
    return (
        f'<div class="tile"><strong>{escape(value)}</strong><span>{escape(label)}</span>'
        f"<small>{escape(note)}</small></div>"
    )


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    text_columns: int = 1,
    notes: bool = False,
) -> str:
    def style(column: int) -> str:
        is_text = column < text_columns or (notes and column == len(header) - 1)
        return "" if is_text else ' class="number"'

    head = "".join(f"<th{style(i)}>{escape(name)}</th>" for i, name in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{style(i)}>{escape(str(cell))}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _layers(layers: object) -> str:
    """Layers in words: ``0-5``, ``4, 5``, or a dash."""
    if not isinstance(layers, list) or not layers:
        return "-"
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(str(layer) for layer in layers)


def _size(count: float) -> str:
    if not count:
        return "-"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
