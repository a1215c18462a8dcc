# SPDX-License-Identifier: Apache-2.0
"""Every promise of docs/guarantees.md names a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
ROWS = re.findall(
    r"^\| (?P<promise>.+?) \| \[`(?P<test>\w+)`\]\((?P<path>[^)]+)\) \|$",
    (DOCS / "guarantees.md").read_text(),
    flags=re.MULTILINE,
)


@pytest.mark.parametrize(("promise", "test", "path"), ROWS, ids=[row[1] for row in ROWS])
def test_promise_has_its_test(promise: str, test: str, path: str) -> None:
    tree = ast.parse((DOCS / path).resolve().read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    assert promise.endswith(".")
    assert test in functions


def test_every_line_of_a_table_is_a_promise() -> None:
    lines = [line for line in (DOCS / "guarantees.md").read_text().splitlines() if "|" in line]
    promises = [line for line in lines if not line.startswith(("| promise |", "| --- |"))]

    assert len(promises) == len(ROWS) > 0
