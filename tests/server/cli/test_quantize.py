# SPDX-License-Identifier: Apache-2.0
"""``lorikit quantize`` on a small folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorikit.server.cli.app import run
from lorikit.server.cli.exit_codes import ExitCode
from lorikit.server.convert import ConvertedFolder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float16)
    vector = np.ones(256, np.float32)
    save_file({"query.weight": weights, "query.bias": vector}, folder / "model.safetensors")
    return folder


def test_json_has_sizes_and_errors_by_class(model: Path, tmp_path: Path, capsys) -> None:
    command = ["quantize", str(model), "--to", "nf4", "--to", "int4", "--to", "nf4"]
    assert run([*command, "--out", str(tmp_path / "out"), "--format", "json"]) == 0

    facts = json.loads(capsys.readouterr().out)
    nf4, int4 = facts["targets"]
    assert (nf4["codec"], int4["codec"]) == ("nf4", "int4-row64")
    assert nf4["source_bytes"] == 2 * 256 * 128 + 4 * 256
    assert nf4["bytes"] == 256 * 128 // 2 + 4 * 256 * 128 // 64 + 4 * 256
    matrix, vector = nf4["classes"]
    assert (matrix["class"], matrix["tensors"], matrix["elements"]) == ("matrix", 1, 256 * 128)
    assert matrix["sqnr_db"] == pytest.approx(20.5, abs=0.3)
    assert matrix["relative_mse"] == pytest.approx(10 ** (-matrix["sqnr_db"] / 10))
    assert (vector["sqnr_db"], vector["max_abs_error"]) == (None, 0.0)
    assert ConvertedFolder(tmp_path / "out" / "int4-row64").codec == "int4-row64"


def test_table_is_for_people_and_nothing_is_written_without_a_folder(model: Path, capsys) -> None:
    assert run(["quantize", str(model), "--to", "int8"]) == 0

    shown = capsys.readouterr().out
    assert "SQNR (dB)" in shown
    assert "exact" in shown
    assert sorted(path.name for path in model.iterdir()) == ["model.safetensors"]


def test_what_cannot_be_converted_is_said_in_one_line(model: Path, tmp_path: Path, capsys) -> None:
    assert run(["quantize", str(model), "--to", "int2"]) == ExitCode.MODEL
    assert "cannot convert to 'int2'; known are nf4" in capsys.readouterr().err
    assert run(["quantize", str(tmp_path / "gone"), "--to", "nf4"]) == ExitCode.NOT_FOUND
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(["quantize", str(tmp_path / "empty"), "--to", "nf4"]) == ExitCode.MODEL
    assert "save_pretrained" in capsys.readouterr().err
