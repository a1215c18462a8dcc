# SPDX-License-Identifier: Apache-2.0
"""Rows as an app has them, checked value by value."""

from __future__ import annotations

import operator
from collections.abc import Mapping

from lorikit.proto.manifest import Task
from lorikit.sdk._errors import DataError

Row = Mapping[str, object] | tuple[object, object] | str
"""Columns by name, a pair of input and label, or a text alone where it needs no label."""

KINDS = {
    "text": "a mapping nor a pair (text, label)",
    "image": "a mapping nor a pair (image, label)",
    "words": "a mapping nor a pair (words, labels)",
}


def columns(number: int, row: object, names: tuple[str, str], kind: str) -> tuple[object, object]:
    """The two columns of a row, given by name or as a pair.

    Args:
        number: Of the row, for the message.
        row: A mapping or a pair.
        names: Of the columns.
        kind: What the first column holds: ``text``, ``image`` or ``words``.

    Raises:
        DataError: It is neither, or lacks a column.
    """
    if isinstance(row, Mapping):
        return _column(number, row, names[0]), _column(number, row, names[1])
    if isinstance(row, tuple | list) and len(row) == 2:
        return row[0], row[1]
    raise DataError(f"row {number} is neither {KINDS[kind]}: {row!r:.80}")


def text_column(number: int, row: object, task: Task) -> str:
    """The text of a row that needs no label: a mapping with the column, or the text itself.

    Raises:
        DataError: It is neither.
    """
    if isinstance(row, Mapping):
        return as_text(number, _column(number, row, task.text_column))
    if isinstance(row, str):
        return row
    raise DataError(
        f"row {number} is neither a mapping with column {task.text_column!r} nor a text: "
        f"{row!r:.80}"
    )


def as_text(number: int, value: object, what: str = "text") -> str:
    """The value, if it is a text; else a ``DataError`` that names row and type."""
    if not isinstance(value, str):
        raise DataError(
            f"row {number}: the {what} is of type {type(value).__name__}: {value!r:.80}"
        )
    return value


class Classes:
    """A task's classes, by name and by number."""

    def __init__(self, task: Task) -> None:
        """Number the names."""
        self.names = task.labels
        self._numbers = {name: number for number, name in enumerate(task.labels)}

    def number(self, row: int, label: object) -> int:
        """The number of a class given by name or number.

        Raises:
            DataError: There is no such class; names row and value.
        """
        if isinstance(label, str) and label in self._numbers:
            return self._numbers[label]
        if not isinstance(label, str | bool):
            try:
                value = operator.index(label)  # type: ignore[arg-type]  # TypeError says it is no integer
            except TypeError:
                value = -1
            if 0 <= value < len(self.names):
                return value
        known = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        raise DataError(
            f"row {row}: label {label!r:.80} is no class of the task; "
            f"classes are 0 to {len(self.names) - 1}: {known}"
        )


def _column(number: int, row: Mapping[str, object], name: str) -> object:
    if name not in row:
        raise DataError(f"row {number} has no column {name!r}; its columns are {sorted(row)}")
    return row[name]
