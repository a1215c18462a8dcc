# SPDX-License-Identifier: Apache-2.0
"""Which tensor gets how many bits when all of them share a budget of bytes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorikit.quantization.base import QuantizationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to send a tensor."""

    codec: str
    nbytes: int
    """What it takes."""
    distortion: float
    """What it costs: importance times squared error."""


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> dict[str, Choice]:
    """One choice per tensor with a small total distortion, within a budget of bytes.

    Every tensor starts at its cheapest choice. Then the step with the largest drop of distortion
    per byte is taken, over and over, along the lower convex hull of each tensor's choices; a step
    that does not fit ends the climb of its tensor. The result is optimal for the bytes it takes
    whenever no step had to be left out, and else at most the drop of the first step left out above
    the optimum. At last any single choice that still fits and helps is taken.

    Args:
        choices: For each tensor the ways to send it, at least one.
        budget_bytes: Most bytes of all tensors together.

    Raises:
        QuantizationError: Even the cheapest choices exceed the budget; the message says by how
            much.

    Source:
        Shoham & Gersho 1988, "Efficient Bit Allocation for an Arbitrary Set of Quantizers",
        https://doi.org/10.1109/29.90373: the Lagrangian solution runs along the hulls.
    """
    hulls = {name: _hull(options) for name, options in choices.items()}
    taken = {name: hull[0] for name, hull in hulls.items()}
    left = budget_bytes - sum(choice.nbytes for choice in taken.values())
    if left < 0:
        raise QuantizationError(
            f"a budget of {budget_bytes} bytes is {-left} too small for {len(choices)} tensors at "
            "their fewest bits; raise it or send fewer tensors"
        )
    left = _climb(hulls, taken, left)
    _fill(choices, taken, left)
    return taken


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of distortion over bytes, from the cheapest choice to the best."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda each: (each.nbytes, each.distortion)):
        if hull and option.distortion >= hull[-1].distortion:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(lower: Choice, upper: Choice) -> float:
    """Drop of distortion per byte."""
    return (lower.distortion - upper.distortion) / (upper.nbytes - lower.nbytes)


def _climb(hulls: Mapping[str, list[Choice]], taken: dict[str, Choice], left: int) -> int:
    """Take steps along the hulls, the steepest first; returns the bytes that are left."""
    steps = sorted(
        (
            (-_slope(lower, upper), name, place)
            for name, hull in hulls.items()
            for place, (lower, upper) in enumerate(itertools.pairwise(hull))
        ),
    )
    ended: set[str] = set()
    for _, name, place in steps:
        step = hulls[name][place + 1].nbytes - hulls[name][place].nbytes
        if name in ended or step > left:
            ended.add(name)
            continue
        taken[name] = hulls[name][place + 1]
        left -= step
    return left


def _fill(choices: Mapping[str, Sequence[Choice]], taken: dict[str, Choice], left: int) -> None:
    """Spend what is left, on the largest drop that fits, until nothing does."""
    while True:
        better = [
            (taken[name].distortion - option.distortion, -option.nbytes, name, option)
            for name, options in choices.items()
            for option in options
            if option.nbytes - taken[name].nbytes <= left
            and option.distortion < taken[name].distortion
        ]
        if not better:
            return
        _, _, name, option = max(better, key=lambda each: each[:3])
        left -= option.nbytes - taken[name].nbytes
        taken[name] = option
