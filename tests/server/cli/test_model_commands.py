# SPDX-License-Identifier: Apache-2.0
"""``lorikit compile`` on a real model of two small layers."""

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
