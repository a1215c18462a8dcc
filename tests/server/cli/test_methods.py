# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorikit.server.cli.app import run
from lorikit.server.cli.exit_codes import ExitCode
from lorikit.server.methods import METHODS


def test_help_has_an_example(capsys):
    assert run(["methods", "--help"]) == 0

    assert "Example: lorikit methods --model" in " ".join(capsys.readouterr().out.split())


def test_every_method_is_listed_without_a_model(capsys):
    assert run(["methods"]) == 0

    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in METHODS)
    assert "Give --model for bytes" in shown


def test_json_says_what_a_program_needs_to_choose(capsys):
    assert run(["methods", "--format", "json"]) == 0

    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == METHODS.keys()
    assert rows["hetlora"]["devices_may_differ_in"] == ["ranks"]
    assert rows["flora"]["roles"] == ["delta_A", "delta_B", "head", "lora_A", "lora_B"]
    assert "rounds" not in rows["fedit"]


def test_bytes_are_those_of_the_users_model(tiny_model: Path, capsys):
    command = ["methods", "--model", str(tiny_model), "--labels", "3", "--rank", "4"]

    assert run([*command, "--format", "json"]) == 0

    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    [fedit] = rows["fedit"]["rounds"]
    even, odd = rows["rolora"]["rounds"]
    assert fedit["bytes_up"] == fedit["bytes_down"] > even["bytes_up"]
    head = even["bytes_up"] + odd["bytes_up"] - fedit["bytes_up"]  # it is in both halves
    assert head == 4 * (3 * _width(tiny_model) + 3)
    assert (rows["fedbf"]["lacks_roles"], rows["fedbf"]["rounds"]) == (["bias"], [])
    assert rows["flora"]["rounds"][0]["bytes_down"] > fedit["bytes_down"]


def test_the_table_of_a_model_shows_what_its_package_lacks(tiny_model: Path, capsys):
    assert run(["methods", "--model", str(tiny_model)]) == 0

    shown = capsys.readouterr().out
    assert "this package lacks" in shown
    assert "largest rank 8" in shown


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys):
    assert run(["methods", "--model", str(tmp_path)]) == ExitCode.NOT_FOUND

    assert "no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rank", "--labels"])
def test_sizes_of_zero_are_usage_errors(option):
    assert run(["methods", option, "0"]) == 2


def _width(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["hidden_size"])
