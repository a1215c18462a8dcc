# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from lorikit.server.cli.app import app, run
from lorikit.server.cli.demo import METHODS as DEMO_METHODS
from lorikit.server.demo.settings import METHOD_OPTIONS
from lorikit.server.methods import FACTS

CLI_PAGE = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()


def commands_of(group: typer.Typer, *path: str) -> list[tuple[str, ...]]:
    found = [
        (*path, str(command.name or command.callback.__name__))
        for command in group.registered_commands
    ]
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        found += commands_of(inner.typer_instance, *path, str(inner.name))
    return found


COMMANDS = commands_of(app)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_has_an_example(command, capsys):
    assert run([*command, "--help"]) == 0

    assert f"Example: lorikit {' '.join(command)}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_on_the_page(command):
    assert f"lorikit {command[0]}" in CLI_PAGE


def test_methods_of_the_demo_are_on_the_page():
    assert f"# {', '.join(DEMO_METHODS)}\n" in CLI_PAGE
    assert set(METHOD_OPTIONS) <= set(DEMO_METHODS) < set(FACTS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != ("version",)], ids=" ".join)
def test_unknown_option_is_a_usage_error(command):
    assert run([*command, "--no-such-option"]) == 2


def test_version_as_json_names_the_wire_formats(capsys):
    assert run(["version", "--format", "json"]) == 0

    facts = json.loads(capsys.readouterr().out)
    assert facts["protocol"] == 1
    assert facts["packages"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compile", "MISSING", "--store", "s", "--num-labels", "2"], 8, "save_pretrained"),
        (["compile", "MISSING", "--store", "s"], 2, "--num-labels"),
        (["compile", "x", "--store", "s", "--num-labels", "2", "--labels", "a,b"], 2, "either"),
        (["profile", "--model", "MISSING"], 8, "config.json"),
        (["profile", "--model", "x", "--class", "toaster"], 8, "no device class toaster"),
        (["demo", "--method", "guess"], 2, "hetlora"),
        (["server", "--address", "0.0.0.0:0"], 3, "TLS"),
        (["run", "create", "MISSING.toml"], 3, "MISSING.toml"),
    ],
)
def test_error_is_one_line_with_the_value_and_the_remedy(arguments, code, words, capsys):
    assert run(arguments) == code

    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lorikit: ")
    assert words in lines[0]


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match=r"config\.json"):
        run(["--debug", "profile", "--model", "MISSING"])


def test_demo_refuses_a_folder_that_holds_something_else(tmp_path: Path, capsys):
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")

    code = run(["demo", "--model", str(tmp_path), "--folder", str(tmp_path)])

    assert code == 9
    assert "choose another --folder" in capsys.readouterr().err
    assert precious.read_text() == "years of work"
