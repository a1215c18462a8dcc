# SPDX-License-Identifier: Apache-2.0
"""What commands print: tables for people, JSON for programs, progress on the error stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

MEGABYTE = 1_000_000
"""Bytes of the MB that tables and reports show."""


class Format(StrEnum):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[
    Format, typer.Option("--format", help="Print a table for people, or JSON for programs.")
]


class Announce(Protocol):
    """Says what is being done now."""

    def __call__(self, text: str, /) -> None:
        """Replace the line shown."""


def print_json(value: object) -> None:
    """Write one JSON document to standard output."""
    typer.echo(json.dumps(value, indent=2))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = ""
) -> None:
    """Write a table to standard output; numbers stand on the right."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_numeric(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if Console().is_terminal else 160).print(table)


def megabytes(count: float) -> str:
    """Bytes as whole megabytes, for people; a dash for zero, which means unknown."""
    return f"{count / MEGABYTE:,.0f} MB" if count else "-"


@contextmanager
def progress(text: str) -> Iterator[Announce]:
    """A line on the error stream that shows what is being done and for how long.

    On a terminal it moves; elsewhere each new text is one plain line.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(text, markup=False, highlight=False)
        yield lambda text, /: console.print(text, markup=False, highlight=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda text, /: bar.update(task, description=text)


def _is_numeric(cell: object) -> bool:
    return isinstance(cell, int | float) or str(cell)[:1].isdigit() or str(cell) == "-"
