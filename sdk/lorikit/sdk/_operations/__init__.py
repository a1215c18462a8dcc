# SPDX-License-Identifier: Apache-2.0
"""The device's vocabulary: operations that a plan may name, one a file.

A plan's operation becomes an object of the class listed here under its name and version; its
arguments are the fields of that class. Whatever is not listed is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from lorikit.proto.plan import Operation, Value
from lorikit.sdk._errors import PlanRefusedError
from lorikit.sdk._operations.base import FinalOperation, GradientOperation
from lorikit.sdk._operations.class_sums import ClassSums
from lorikit.sdk._operations.prune_tail import PruneTail
from lorikit.sdk._operations.tail_penalty import TailPenalty

Key = tuple[str, int]
Kind = TypeVar("Kind")

GRADIENT_OPERATIONS: Mapping[Key, type[GradientOperation]] = {("tail_penalty", 1): TailPenalty}
"""Operations of a phase, by name and version."""

FINAL_OPERATIONS: Mapping[Key, type[FinalOperation]] = {
    ("prune_tail", 1): PruneTail,
    ("class_sums", 1): ClassSums,
}
"""Operations after training, by name and version."""


def operation_names() -> tuple[str, ...]:
    """``name@version`` of every operation, for the profile."""
    keys = sorted([*GRADIENT_OPERATIONS, *FINAL_OPERATIONS])
    return tuple(f"{name}@{version}" for name, version in keys)


def build(operation: Operation, known: Mapping[Key, type[Kind]]) -> Kind:
    """The object that carries out one operation of a plan.

    Args:
        operation: Name, version and arguments as the plan has them.
        known: ``GRADIENT_OPERATIONS`` or ``FINAL_OPERATIONS``.

    Raises:
        PlanRefusedError: Unknown name or version, an unknown or missing argument, or a bad value.
    """
    label = f"operation {operation.name}@{operation.version}"
    kind = known.get((operation.name, operation.version))
    if kind is None:
        have = ", ".join(f"{name}@{version}" for name, version in sorted(known))
        raise PlanRefusedError(f"{label} is unknown here (known: {have}); update the app")
    _check_arguments(label, operation.arguments, kind)
    try:
        return kind(**operation.arguments)
    except (TypeError, ValueError) as error:
        raise PlanRefusedError(f"{label}: {error}") from error


def _check_arguments(label: str, arguments: Mapping[str, Value], kind: type[object]) -> None:
    assert dataclasses.is_dataclass(kind), "operations are dataclasses"
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(arguments) - set(fields))
    if unknown:
        raise PlanRefusedError(f"{label} has no argument {unknown[0]!r}")
    for name, value in arguments.items():
        wanted = str(fields[name].type)
        if type(value).__name__ not in (wanted, "int" if wanted == "float" else wanted):
            raise PlanRefusedError(f"{label}: argument {name} must be {wanted}, got {value!r}")
