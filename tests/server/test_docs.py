# SPDX-License-Identifier: Apache-2.0
"""The server's page says what the code says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from lorikit.server.config import LimitsConfig, RunConfig, ServerConfig
from lorikit.server.states import ROUND_TRANSITIONS

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        [*RunConfig.model_fields],
        [name for name in ServerConfig.model_fields if name != "limits"],
        [f"limits.{name}" for name in LimitsConfig.model_fields],
    ],
    ids=["run", "server", "limits"],
)
def test_every_setting_is_described(settings):
    missing = [name for name in settings if f"`{name}`" not in PAGE]

    assert missing == []


def test_diagram_shows_the_transitions_of_the_code():
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)", PAGE, re.MULTILINE))

    allowed = {(b.value, a.value) for b, after in ROUND_TRANSITIONS.items() for a in after}
    assert drawn == allowed


def test_examples_of_the_page_are_valid():
    toml = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    python = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)

    assert toml is not None
    assert python is not None
    RunConfig.model_validate(tomllib.loads(toml[1]))
    compile(python[1], "docs/server.md", "exec")
