# SPDX-License-Identifier: Apache-2.0
"""CLINC150, bundled under CC BY 3.0; ``README.md`` beside this file has the attribution."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from importlib import resources

Row = Mapping[str, str]
"""One example: ``text``, ``intent`` and ``domain``."""

OUT_OF_SCOPE = "oos"
"""Intent of the rows that belong to none of the 150."""


def in_scope_rows(split: str) -> tuple[Row, ...]:
    """The rows of ``train`` (15,000) or ``test`` (4,500) that carry one of the 150 intents."""
    packed = resources.files(__name__).joinpath(f"{split}.jsonl.gz").read_bytes()
    rows = (json.loads(line) for line in gzip.decompress(packed).decode().splitlines())
    return tuple(row for row in rows if row["intent"] != OUT_OF_SCOPE)


def intents(rows: Sequence[Row]) -> tuple[str, ...]:
    """The intents that occur, in alphabetical order: class names by index."""
    return tuple(sorted({row["intent"] for row in rows}))
