# SPDX-License-Identifier: Apache-2.0
"""``lorikit compile`` and ``lorikit profile`` on a real model of two small layers."""

from __future__ import annotations

import json
from pathlib import Path

from lorikit.proto.manifest import load
from lorikit.server.cli.app import run
from lorikit.server.cli.exit_codes import ExitCode
from lorikit.server.store.blobs import FolderBlobs


def test_compile_leaves_a_package_whose_blobs_are_all_there(tiny_model: Path, tmp_path, capsys):
    store = tmp_path / "store"
    command = ["compile", str(tiny_model), "--store", str(store), "--labels", "a,b,c"]

    assert run([*command, "--precision", "int8", "--format", "json"]) == 0

    facts = json.loads(capsys.readouterr().out)
    blobs = FolderBlobs(store)
    manifest = load(blobs.read(facts["manifest"]))
    assert manifest.task.labels == ("a", "b", "c")
    assert all(blobs.has(entry["digest"]) for entry in facts["blobs"])
    assert {entry["codec"] for entry in facts["codecs"]} == {w.codec for w in manifest.weights}
    peaks = list(facts["predicted_peak_memory_bytes"].values())
    assert peaks == sorted(peaks)  # larger micro-batches never take less


def test_compile_prints_tables_for_people(tiny_model: Path, tmp_path, capsys):
    command = ["compile", str(tiny_model), "--store", str(tmp_path), "--num-labels", "3"]

    assert run(command) == 0

    shown = capsys.readouterr().out
    assert "predicted peak" in shown
    assert "codec as written" in shown


def test_compile_of_layers_that_are_not_there_is_a_model_error(tiny_model: Path, tmp_path, capsys):
    command = ["compile", str(tiny_model), "--store", str(tmp_path), "--num-labels", "2"]

    assert run([*command, "--kept-layers", "7"]) == ExitCode.MODEL

    assert "7" in capsys.readouterr().err


def test_profile_plans_for_each_class_or_says_what_would_help(tiny_model: Path, tmp_path, capsys):
    mine = tmp_path / "mine.toml"
    mine.write_text('[speck]\nmemory_limit = "20MB"\n[plenty]\nmemory_limit = "2GB"\n')
    command = ["profile", "--model", str(tiny_model), "--classes", str(mine), "--length", "16"]

    assert run([*command, "--class", "speck", "--class", "plenty", "--format", "json"]) == 0

    speck, plenty = json.loads(capsys.readouterr().out)["classes"]
    assert (speck["class"], speck["fits"], speck["plan"]) == ("speck", False, None)
    assert "MiB" in speck["remedy"]
    assert plenty["fits"]
    assert plenty["plan"]["rank"] == 8
    assert plenty["predicted_peak_memory_bytes"] < 2_000_000_000


def test_profile_as_text_names_the_remedy_of_a_class_that_does_not_fit(
    tiny_model: Path, tmp_path, capsys
):
    mine = tmp_path / "mine.toml"
    mine.write_text('[speck]\nmemory_limit = "20MB"\n')

    assert run(["profile", "--model", str(tiny_model), "--classes", str(mine)]) == 0

    assert "speck: The smallest plan" in capsys.readouterr().out.replace("\n", " ")
