# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from lorikit.proto.status import ErrorCode
from lorikit.server.cli import _MISSING_PART
from lorikit.server.cli.errors import explain
from lorikit.server.cli.exit_codes import (
    MEANINGS,
    OF_REFUSAL,
    CommandError,
    ExitCode,
    markdown_table,
)
from lorikit.server.config import ConfigError, RunConfig
from lorikit.server.errors import (
    LorikitError,
    RequestError,
    UnsupportedModelError,
    VerificationError,
)
from lorikit.server.planner import DoesNotFitError


def test_every_code_has_a_meaning_and_stands_in_the_documentation():
    page = Path(__file__).parents[3] / "docs" / "cli.md"

    assert set(MEANINGS) == set(ExitCode)
    assert markdown_table() in page.read_text(encoding="utf-8")


def test_entry_point_uses_the_same_number_without_importing_the_table():
    assert _MISSING_PART == ExitCode.MISSING_PART


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandError(ExitCode.USAGE, "x"), ExitCode.USAGE),
        (UnsupportedModelError("x"), ExitCode.MODEL),
        (VerificationError("x"), ExitCode.MODEL),
        (DoesNotFitError("reason", "remedy"), ExitCode.DOES_NOT_FIT),
        (ConfigError("x"), ExitCode.CONFIG),
        (LorikitError("x"), ExitCode.RUN_FAILED),
        (FileNotFoundError(2, "no", "here"), ExitCode.NOT_FOUND),
        (PermissionError(13, "denied", "here"), ExitCode.STORAGE),
        (ModuleNotFoundError("no", name="torch"), ExitCode.MISSING_PART),
        (ModuleNotFoundError("no", name="lorikit.server.nothing"), ExitCode.INTERNAL),
        (KeyError("x"), ExitCode.INTERNAL),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error, code):
    found, sentence = explain(error)

    assert found is code
    assert "\n" not in sentence


@pytest.mark.parametrize("code", ErrorCode)
def test_every_refusal_of_a_server_has_an_exit_code_other_than_success(code):
    found, sentence = explain(RequestError(code, "the detail"))

    assert found is OF_REFUSAL.get(code, ExitCode.REFUSED)
    assert found is not ExitCode.OK
    assert "the detail" in sentence


def test_wrong_settings_name_field_and_value():
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # pydantic's own message is checked below
        RunConfig.model_validate({"name": "a", "model": "m", "labels": ["x", "y"], "rounds": -3})

    code, sentence = explain(caught.value)

    assert code is ExitCode.CONFIG
    assert "rounds" in sentence
    assert "-3" in sentence
