# SPDX-License-Identifier: Apache-2.0
"""The pages of the methods are those that the code would write."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from lorikit.server.methods import FACTS, METHODS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_method_pages", ROOT / "scripts" / "generate_method_pages.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(script: ModuleType) -> None:
    written = {path.name: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}

    stale = [name for name, text in script.pages().items() if written.get(name) != text]

    assert stale == [], "run scripts/generate_method_pages.py"
    assert written.keys() == {"README.md", *(f"{name}.md" for name in METHODS)}


def test_the_example_has_the_numbers_of_the_model(script: ModuleType) -> None:
    """Rank 8 on query and value: 73,728 parameters; 150 classes: 57,750; 26,112 biases."""
    costs = script.example_costs()

    assert costs["fedit"][0].up == 4 * (73_728 + 57_750)
    assert costs["ffa-lora"][0].up == 4 * (73_728 // 2 + 57_750)
    assert costs["fedbf"][0].up == 4 * (26_112 + 57_750)
    assert all(costs[name] for name in FACTS)


def test_every_option_is_explained_to_readers_who_do_not_know_the_code(script: ModuleType) -> None:
    for name, text in script.pages().items():
        assert not re.search(r"(?<!`)``(?!`)", text), name
        assert "DeviceRankConfig" not in text, name


def test_a_docstring_without_its_sections_is_refused(script: ModuleType) -> None:
    class Bare:
        """Nothing but a sentence."""

    with pytest.raises(ValueError, match="Bare has no section Equations, Ours, Source"):
        script.docstring_sections(Bare)


def test_the_overview_names_every_method() -> None:
    overview = (ROOT / "docs" / "methods.md").read_text()

    assert [name for name in METHODS if f"[`{name}`](methods/{name}.md)" not in overview] == []
