# SPDX-License-Identifier: Apache-2.0
"""Bits go where they help most; brute force agrees on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.quantization import QuantizationError
from lorikit.quantization.allocation import Choice, allocate

BITS = (1, 2, 3, 4, 6, 8)


def choices_of(elements: int, weight: float, noise: np.random.Generator) -> list[Choice]:
    """Ways to send a tensor, with about the error of a uniform quantiser."""
    return [
        Choice(
            codec=f"int{bits}",
            nbytes=bits * elements // 8,
            distortion=weight * elements * 4.0**-bits * float(noise.uniform(0.8, 1.25)),
        )
        for bits in BITS
    ]


def brute_force(choices: dict[str, list[Choice]], budget: int) -> float:
    return min(
        sum(choice.distortion for choice in combination)
        for combination in itertools.product(*choices.values())
        if sum(choice.nbytes for choice in combination) <= budget
    )


def total(taken: dict[str, Choice]) -> tuple[int, float]:
    return sum(c.nbytes for c in taken.values()), sum(c.distortion for c in taken.values())


@given(
    elements=st.lists(st.sampled_from([8, 64, 200, 1000]), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
)
def test_result_is_as_good_as_brute_force_up_to_one_step(
    elements: list[int], seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = 10 ** rng.uniform(-3, 3, len(elements))
    choices = {
        f"t{i}": choices_of(n, float(w), rng)
        for i, (n, w) in enumerate(zip(elements, weights, strict=True))
    }
    least, most = sum(elements) // 8, sum(elements)
    budget = int(least + share * (most - least))

    nbytes, distortion = total(allocate(choices, budget))

    best = brute_force(choices, budget)
    step = max(
        a.distortion - b.distortion
        for options in choices.values()
        for a, b in itertools.combinations(options, 2)
    )
    assert nbytes <= budget
    assert best <= distortion <= best + step


@given(seed=st.integers(0, 1000), price=st.floats(-6, 6))
def test_budget_at_a_corner_of_the_hulls_gives_the_optimum(seed: int, price: float) -> None:
    rng = np.random.default_rng(seed)
    choices = {
        f"t{i}": choices_of(64 + 8 * i, float(10 ** rng.uniform(-2, 2)), rng) for i in (1, 2, 3)
    }
    corner = [
        min(options, key=lambda option: option.distortion + 10**price * option.nbytes)
        for options in choices.values()
    ]
    budget = sum(option.nbytes for option in corner)

    nbytes, distortion = total(allocate(choices, budget))

    assert nbytes <= budget
    assert distortion == pytest.approx(brute_force(choices, budget), rel=1e-12)


def test_important_tensors_get_more_bits() -> None:
    rng = np.random.default_rng(0)
    choices = {
        "dull": choices_of(1000, 1e-4, rng),
        "plain": choices_of(1000, 1.0, rng),
        "important": choices_of(1000, 1e4, rng),
    }
    taken = allocate(choices, 4 * 3 * 1000 // 8)
    bits = [int(taken[name].codec.removeprefix("int")) for name in choices]
    assert bits == sorted(bits)
    assert bits[0] < bits[2]


def test_a_budget_for_everything_buys_everything() -> None:
    choices = {"a": choices_of(64, 1.0, np.random.default_rng(0))}
    assert allocate(choices, 10**9)["a"].codec == "int8"


def test_useless_bytes_are_not_spent() -> None:
    options = [
        Choice(codec="few", nbytes=10, distortion=1.0),
        Choice(codec="worse", nbytes=20, distortion=2.0),
        Choice(codec="same", nbytes=30, distortion=1.0),
    ]
    assert allocate({"a": options}, 1000)["a"].codec == "few"


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    choices = {"a": choices_of(64, 1.0, np.random.default_rng(0))}
    with pytest.raises(QuantizationError, match="a budget of 7 bytes is 1 too small for 1 tensors"):
        allocate(choices, 7)


def test_nothing_to_send_needs_no_budget() -> None:
    assert allocate({}, 0) == {}
