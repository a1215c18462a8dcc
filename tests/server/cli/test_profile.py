# SPDX-License-Identifier: Apache-2.0
"""``lorikit profile`` on a real model of three small layers, with real device processes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorikit.server.cli.app import run
from lorikit.server.cli.device_classes import DeviceClass
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.cli.profile import _print
from lorikit.server.cli.profile_page import page
from lorikit.server.cli.profile_picture import PARTS, svg, write_png
from lorikit.server.cli.profile_plans import ClassPlan, Measured, Misfit, facts
from lorikit.server.planner import Choice, Footprint

MB = 1_000_000


CLASSES = """
[speck]
memory_limit = "20MB"
[plenty]
memory_limit = "2GB"
speed_gflops = 50
[small]
memory_limit = "150MB"
"""


@dataclass(frozen=True)
class Profiled:
    classes: dict[str, dict]
    html: str
    png: bytes


@pytest.fixture(scope="module")
def profiled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """One run of the command with everything it can do; loading and exporting take the time."""
    pytest.importorskip("matplotlib", reason="pictures as files need matplotlib")
    folder = tmp_path_factory.mktemp("profile")
    (folder / "mine.toml").write_text(CLASSES)
    command = ["profile", "--model", str(tiny_model), "--classes", str(folder / "mine.toml")]
    command += ["--length", "16", "--batch-size", "4", "--measure", "--format", "json"]
    command += ["--html", str(folder / "page.html"), "--picture", str(folder / "bars.png")]
    for name in ("speck", "plenty", "small"):
        command += ["--class", name]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(command) == 0
    return Profiled(
        classes={entry["class"]: entry for entry in json.loads(out.getvalue())["classes"]},
        html=(folder / "page.html").read_text(),
        png=(folder / "bars.png").read_bytes(),
    )


def test_parts_of_a_plan_add_up_to_its_peak(profiled: Profiled):
    plenty = profiled.classes["plenty"]

    assert sum(plenty["breakdown"].values()) == plenty["predicted_peak_memory_bytes"]
    assert set(plenty["breakdown"]) == {part for part, _, _ in PARTS}
    assert plenty["plan"]["recomputed_layers"] == []
    assert plenty["plan"]["rank"] == 8
    assert plenty["flops_per_step"] > 0
    assert 0 < plenty["bytes_up_per_round"] <= plenty["bytes_down_per_round"]


def test_class_that_does_not_fit_says_what_would_help(profiled: Profiled):
    speck = profiled.classes["speck"]

    assert (speck["fits"], speck["plan"], speck["breakdown"]) == (False, None, None)
    assert "MiB" in speck["remedy"]


@pytest.mark.parametrize("name", ["plenty", "small"])
def test_measured_peak_of_a_real_process_is_near_the_prediction(profiled: Profiled, name: str):
    entry = profiled.classes[name]

    ratio = entry["measured_peak_memory_bytes"] / entry["predicted_peak_memory_bytes"]
    assert 0.88 < ratio < 1.12  # a tiny model: nearly all of it is the runtime
    assert entry["measured_peak_memory_bytes"] < entry["memory_limit_bytes"]
    assert 0 < entry["measured_anonymous_memory_bytes"] < entry["measured_peak_memory_bytes"]
    assert entry["measured_seconds_per_step"] > 0


def test_page_opens_without_a_network_and_names_every_class(profiled: Profiled):
    assert "http" not in profiled.html
    assert all(name in profiled.html for name in profiled.classes)
    assert profiled.png.startswith(b"\x89PNG")


def test_text_shows_parts_and_remedies(capsys):
    _print("a model", [entry(), Misfit(device_class=device_class("a", 1), reason="r", remedy="s")])

    shown = capsys.readouterr().out
    assert "Predicted peak by part" in shown
    assert "a: r s" in shown


def test_unknown_kind_of_model_is_a_model_error(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')

    assert run(["profile", "--model", str(tmp_path)]) == ExitCode.MODEL

    assert "resnet" in capsys.readouterr().err


def device_class(name: str, limit: int) -> DeviceClass:
    return DeviceClass(
        name=name, memory_limit_bytes=limit * MB, cores=1, speed_gflops=1.0, source="a test"
    )


def entry(limit: int = 200, measured: int | None = None) -> ClassPlan:
    return ClassPlan(
        device_class=device_class("tv", limit),
        choice=Choice(
            precision="nf4", micro_batch=2, predicted_peak_memory_bytes=120 * MB, runtime="onnx"
        ),
        rank=4,
        trained_layers=(1, 2),
        kept_layers=(0, 1, 2),
        lowest_trained_layer=1,
        footprint=Footprint(
            app_bytes=50 * MB,
            runtime_bytes=40 * MB,
            mapped_bytes=10 * MB,
            packed_bytes=0,
            adapter_bytes=2 * MB,
            activation_bytes=15 * MB,
            workspace_bytes=3 * MB,
        ),
        flops_per_step=10**9,
        base_bytes=10 * MB,
        bytes_down=1 * MB,
        bytes_up=1 * MB,
        measured=measured
        and Measured(peak_bytes=measured * MB, anonymous_bytes=9 * MB, seconds_per_step=0.5),
    )


def test_bars_are_as_long_as_their_parts_and_stand_side_by_side():
    drawing = ElementTree.fromstring(svg([entry()]))

    bars = [(float(r.get("x")), float(r.get("width"))) for r in drawing.iter("rect")]
    assert len(bars) == 6  # a part of zero bytes is not drawn
    widths = [width for _, width in bars]
    assert [round(w / widths[0], 2) for w in widths] == [1, 0.8, 0.2, 0.04, 0.3, 0.06]
    for (left, width), (following, _) in itertools.pairwise(bars):
        assert left + width == pytest.approx(following, abs=0.11)  # written to a tenth


def test_limit_is_drawn_where_it_is_in_reach():
    near, far = (svg([entry(limit)]).count("#c2364b") for limit in (150, 9000))

    assert (near, far) == (1, 0)


def test_measured_peak_is_marked_and_compared():
    drawing = svg([entry(measured=125)])

    assert 'class="measured"' in drawing
    assert "120 of 200 MB (-4%)" in drawing
    assert 'class="measured"' not in svg([entry()])


def test_page_escapes_what_users_name():
    odd = Misfit(
        device_class=device_class("<b>x</b>", 20), reason="Too small.", remedy="Grow & go."
    )

    text = page("model <i>", [odd])

    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "Grow &amp; go." in text


def test_facts_of_a_misfit_and_of_a_plan_have_the_fields_that_scripts_read():
    misfit = facts(Misfit(device_class=device_class("a", 1), reason="r", remedy="s"))
    plan = facts(entry(measured=125))

    common = {"class", "fits", "plan", "breakdown", "seconds_per_step"} | {
        "predicted_peak_memory_bytes",
        "measured_peak_memory_bytes",
    }
    assert common <= misfit.keys()
    assert common <= plan.keys()
    assert plan["measured_peak_memory_bytes"] == 125 * MB


def test_picture_without_matplotlib_names_the_command(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(CommandError, match=r"lorikit\[plots\]") as caught:
        write_png(tmp_path / "p.png", "title", [entry()])

    assert caught.value.code is ExitCode.MISSING_PART
