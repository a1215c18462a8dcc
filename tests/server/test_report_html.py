# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lorikit.server.report_html import render

CLASSES = {
    "tiny": (256, 4, 2),
    "small": (512, 4, 4),
    "medium": (2_000, 6, 8),
    "large": (8_000, 6, 8),
}
"""Budget in MB, trained layers and rank by device class."""


def make_report(rounds: int = 8) -> dict[str, object]:
    rng = np.random.default_rng(3)
    return {
        "name": "demo",
        "method": "hetlora",
        "model": "/models/all-MiniLM-L6-v2",
        "task": "sequence-classification",
        "seed": 0,
        "rounds": [make_round(number, rng) for number in range(rounds)],
        "baselines": {
            "centralised": {"name": "centralised LoRA", "metric": 0.951, "examples": 36_864,
                            "seconds": 181.0, "note": "one machine sees all data"},
            "uniform": {"name": "FedIT, smallest rank", "metric": 0.86, "examples": 36_864,
                        "seconds": 230.0, "rounds": [0.3 + 0.07 * n for n in range(rounds)]},
            "linear_probe": {"name": "linear probe", "metric": 0.902, "examples": 15_000,
                             "seconds": 20.0, "note": "frozen features"},
        },
        "final_metric": 0.934,
        "device_classes": {
            name: {"memory_limit_bytes": limit * 1_000_000}
            for name, (limit, _, _) in CLASSES.items()
        },
        "torch_step": {"peak_memory_bytes": 598_000_000, "label": "1 × 32 tokens, NF4"},
        "sentences": ["The federation reached 93.4 % accuracy.", "Memory.", "Bytes."],
    }  # fmt: skip


def make_round(number: int, rng: np.random.Generator) -> dict[str, object]:
    devices = [
        make_device(f"{name}-{copy_number}", name, number, rng)
        for name in CLASSES
        for copy_number in range(3)
    ]
    return {
        "round": number,
        "metric": 0.934 - 0.6 * float(np.exp(-number / 1.6)),
        "loss": 0.3 + 4.0 * float(np.exp(-number / 1.6)),
        "seconds": 28.0 + float(rng.normal(0, 2)),
        "bytes_up": sum(device["bytes_up"] for device in devices),
        "bytes_down": sum(device["bytes_down"] for device in devices),
        "devices": devices,
    }


def make_device(name: str, device_class: str, number: int, rng: np.random.Generator) -> dict:
    _, depth, rank = CLASSES[device_class]
    peak = int(118e6 + 9e6 * rank + rng.normal(0, 2e6))
    update = 36_864 * rank + 230_000
    return {
        "device": name,
        "class": device_class,
        "engine": "onnx",
        "precision": "nf4" if rank < 8 else "fp32",
        "rank": rank,
        "trained_layers": [layer for layer in range(6 - depth, 6) if number % 2 or layer != 3],
        "kept_layers": list(range(6)),
        "micro_batch": 1,
        "peak_memory_bytes": peak,
        "predicted_peak_memory_bytes": int(peak * 1.04),
        "seconds": 20.0,
        "bytes_up": update,
        "bytes_down": update + (17_000_000 if number == 0 else 0),
        "examples": 384,
        "status": "accepted",
    }


class Structure(HTMLParser):
    """Collects what a page would load, and whether its elements close in order."""

    VOID = frozenset({"meta", "line", "rect", "circle", "polyline", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.loaded += [str(value) for key, value in attributes if key in ("src", "href")]
        self.loaded += [tag] if tag in ("script", "link", "img", "iframe") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing():
    page = render(make_report())
    structure = Structure(page)

    assert structure.open == []
    assert structure.loaded == []
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)


def test_page_shows_the_numbers_of_the_run():
    page = render(make_report())

    assert "93.4 %" in page  # final accuracy
    assert "98.2 % of centralised" in page  # 0.934 / 0.951
    assert "budget 256 MB" in page
    assert "598 MB" in page
    assert page.count("<polyline") == 2  # this run and the federated baseline
    assert "The federation reached 93.4 % accuracy." in page


def test_baseline_that_was_cut_short_is_marked_and_not_compared_with():
    report = make_report()
    report["baselines"]["centralised"]["is_complete"] = False

    page = render(report)

    assert "centralised LoRA (cut short)" in page
    assert "of centralised" not in page


def test_one_device_and_one_round_are_summed_by_hand():
    report = make_report(rounds=2)
    for entry in report["rounds"]:
        entry["devices"] = [
            {**entry["devices"][0], "bytes_up": 1_500_000, "bytes_down": 10_000_000}
        ]

    page = render(report)

    assert "<strong>3.0 MB</strong><span>sent by a device</span>" in page
    assert "<small>20.0 MB received</small>" in page


def test_a_partly_trained_layer_has_a_smaller_square():
    page = render(make_report())

    full = re.search(
        r'width="([\d.]+)"[^>]*><title>tiny-0, layer 2: rank 2, trained in 100 %', page
    )
    half = re.search(r'width="([\d.]+)"[^>]*><title>tiny-0, layer 3: rank 2, trained in 50 %', page)

    assert float(half[1]) == pytest.approx(float(full[1]) * np.sqrt(0.5), abs=0.1)


def test_text_from_the_run_cannot_break_the_page():
    report = copy.deepcopy(make_report(rounds=1))
    report["model"] = "<script>alert(1)</script>"
    report["sentences"] = ["$title & <b>"]
    report["rounds"][0]["devices"][0]["device"] = '"><script>'

    page = render(report)

    assert "<script" not in page
    assert "$title &amp; &lt;b&gt;" in page


def test_failed_devices_and_missing_numbers_are_shown_as_such():
    report = make_report(rounds=1)
    report["rounds"][0]["metric"] = None
    report["rounds"][0]["devices"][0] = {
        **report["rounds"][0]["devices"][0],
        "status": "lost",
        "peak_memory_bytes": None,
        "trained_layers": [],
        "rank": None,
    }
    del report["baselines"], report["torch_step"], report["device_classes"], report["sentences"]

    page = render(report)

    assert "11 of 12" in page
    assert "0 of 1" in page
    assert Structure(page).open == []


def test_run_without_rounds_gives_a_page_that_says_so():
    assert "No round has finished yet." in render({"method": "fedit", "rounds": []})
