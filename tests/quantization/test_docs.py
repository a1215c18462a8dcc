# SPDX-License-Identifier: Apache-2.0
"""The example in the page about quantisation runs."""

from __future__ import annotations

import re
from pathlib import Path

from lorikit.quantization import CODECS

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"


def test_example_in_the_page_runs() -> None:
    names: dict[str, object] = {}
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), names)
    assert {"restored", "eight_bits", "update"} <= set(names)


def test_page_lists_every_codec() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in CODECS if f"`{name}`" not in table] == []
