# SPDX-License-Identifier: Apache-2.0
"""Rows of a frozen tensor as a constant of their own.

A graph that needs a large matrix piece by piece names the pieces; when the graph is given a stored
base, each piece becomes a part of the tensor's range in its blob, and nothing is copied or cut at
run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lorikit.server.compile.graph import Graph

_NAME = re.compile(r"(?P<tensor>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")


def row_slice(graph: Graph, name: str, start: int, stop: int) -> str:
    """Name of the constant that holds rows ``start`` to ``stop`` (exclusive) of a constant."""
    values = graph.constants[name]
    if not 0 <= start < stop <= len(values):
        raise ValueError(f"{name} has {len(values)} rows, rows {start} to {stop} are not in it")
    if (start, stop) == (0, len(values)):
        return name
    part = f"{name}[{start}:{stop}]"
    graph.constants[part] = values[start:stop]
    return part


def sliced(name: str) -> tuple[str, int, int] | None:
    """Tensor, first row and end of a constant that ``row_slice`` named; None for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return match["tensor"], int(match["start"]), int(match["stop"])


def row_ranges(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of slices of ``most`` rows; the last has what is left."""
    for start in range(0, rows, most):
        yield start, min(start + most, rows)
