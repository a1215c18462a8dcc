# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.server.demo.clinc150 import in_scope_rows, intents
from lorikit.server.demo.split import dirichlet_split


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.sampled_from("abcd"), min_size=40, max_size=200),
    devices=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_example_goes_to_exactly_one_device(groups, devices, seed):
    parts = dirichlet_split(groups, devices=devices, concentration=1.0, seed=seed)

    assert sorted(index for part in parts for index in part) == list(range(len(groups)))
    assert len(parts) == devices


def test_no_device_gets_fewer_examples_than_promised():
    groups = [row["domain"] for row in in_scope_rows("train")]

    for seed in range(5):
        parts = dirichlet_split(groups, devices=12, concentration=0.3, seed=seed, smallest=100)
        assert min(map(len, parts)) >= 100


def test_same_seed_gives_the_same_split_and_another_seed_another():
    groups = [index % 10 for index in range(500)]

    first, again, other = (
        dirichlet_split(groups, devices=4, concentration=0.3, seed=seed) for seed in (7, 7, 8)
    )

    assert first == again
    assert first != other


def test_no_two_devices_of_the_demo_see_the_same_mix_of_domains():
    rows = in_scope_rows("train")
    parts = dirichlet_split([row["domain"] for row in rows], devices=12, concentration=0.3, seed=0)
    mixes = [Counter(rows[index]["domain"] for index in part) for part in parts]

    for number, mix in enumerate(mixes):
        for other in mixes[number + 1 :]:
            domains = mix.keys() | other.keys()
            distance = 0.5 * sum(
                abs(mix[name] / mix.total() - other[name] / other.total()) for name in domains
            )
            assert distance > 0.1  # total variation; 0 for equal mixes, 1 for disjoint ones


def test_huge_concentration_gives_every_device_the_same_share():
    parts = dirichlet_split(["a"] * 1200, devices=12, concentration=1e9, seed=1)

    assert all(99 <= len(part) <= 101 for part in parts)  # two cuts, each rounded by at most half


@pytest.mark.parametrize(
    ("devices", "concentration"), [(0, 0.3), (3, 0.0), (3, -1.0), (3, float("nan"))]
)
def test_settings_out_of_range_are_refused(devices, concentration):
    with pytest.raises(ValueError, match="got"):
        dirichlet_split(["a"] * 9, devices=devices, concentration=concentration, seed=0)


def test_more_examples_promised_than_there_are_is_refused():
    with pytest.raises(ValueError, match="use fewer devices"):
        dirichlet_split(["a"] * 9, devices=5, concentration=1.0, seed=0, smallest=2)


def test_bundled_data_is_the_standard_split():
    train, test = in_scope_rows("train"), in_scope_rows("test")

    assert (len(train), len(test)) == (15_000, 4_500)
    assert len(intents(train)) == 150
    assert intents(train) == intents(test)
    assert set(Counter(row["intent"] for row in train).values()) == {100}
