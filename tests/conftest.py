# SPDX-License-Identifier: Apache-2.0
"""What every test may ask for: a seeded generator, and the same examples in every run."""

from __future__ import annotations

import os

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("lorikit", derandomize=True, deadline=None)
hypothesis.settings.load_profile("lorikit")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)
