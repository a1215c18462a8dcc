# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from lorikit.server.cli.device_classes import built_in_classes, parse_bytes, parse_classes
from lorikit.server.cli.exit_codes import CommandError, ExitCode


def test_built_in_classes_name_their_sources():
    classes = built_in_classes()

    assert len(classes) >= 5
    assert all(entry.source and entry.memory_limit_bytes > 0 for entry in classes.values())


def test_class_becomes_the_profile_its_devices_would_report():
    text = '[tv]\nmemory_limit = "1.5GiB"\ncores = 3\nspeed_gflops = 7'

    profile = parse_classes(text, "mine.toml")["tv"].profile(baseline_bytes=9)

    assert profile.device_class == "tv"
    assert profile.memory_limit_bytes == 1.5 * 2**30
    assert (profile.cores, profile.speed_gflops, profile.memory_baseline_bytes) == (3, 7.0, 9)


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256_000_000), ("1 GiB", 2**30), ("4096", 4096), ("2kb", 2000)]
)
def test_sizes_with_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a]\ncores = 2", "memory_limit"),
        ('[a]\nmemory_limit = "much"', "much"),
        ('[a]\nmemory_limit = "0MB"', "0MB"),
        ('[a]\nmemory_limit = "1MB"\nmemory = 3', "memory"),
        ("a = 1", "[a]"),
        ("[a", "not valid TOML"),
    ],
)
def test_wrong_class_is_refused_by_name(text, words):
    with pytest.raises(CommandError, match=r"mine\.toml") as caught:
        parse_classes(text, "mine.toml")

    assert caught.value.code is ExitCode.CONFIG
    assert words in str(caught.value)
