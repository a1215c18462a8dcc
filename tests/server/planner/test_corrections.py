# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from lorikit.server.planner import MemoryCorrections


def reported(*ratios: float) -> MemoryCorrections:
    corrections = MemoryCorrections()
    for ratio in ratios:
        corrections.observe("phone", predicted_bytes=1e8, measured_bytes=ratio * 1e8)
    return corrections


def test_class_without_reports_is_taken_at_its_prediction() -> None:
    assert reported(1.2).factor("tablet") == 1.0


def test_factor_comes_to_what_is_measured() -> None:
    assert reported(*[1.15] * 10).factor("phone") == pytest.approx(1.15, rel=1e-2)
    assert reported(*[0.8] * 20).factor("phone") == pytest.approx(0.8, rel=1e-2)


def test_one_report_moves_the_factor_by_a_tenth_at_most() -> None:
    assert reported(1.4).factor("phone") == pytest.approx(1.1)
    assert reported(0.7).factor("phone") == pytest.approx(1 / 1.1)


def test_senseless_reports_stay_within_bounds_and_missing_ones_teach_nothing() -> None:
    assert reported(*[1e6] * 50).factor("phone") == pytest.approx(1.5)
    assert reported(*[1e-6] * 50).factor("phone") == pytest.approx(0.7)
    assert reported(0.0, -1.0, float("nan"), float("inf")).factor("phone") == 1.0


def test_reports_about_the_truth_are_averaged() -> None:
    assert reported(*[1.0, 1.1] * 20).factor("phone") == pytest.approx(1.05, abs=0.03)


def test_what_was_learnt_is_read_back() -> None:
    corrections = reported(1.05, 1.08)

    again = MemoryCorrections.from_json(corrections.to_json())

    assert again.factor("phone") == corrections.factor("phone")
    again.observe("phone", predicted_bytes=1e8, measured_bytes=1.1e8)
    corrections.observe("phone", predicted_bytes=1e8, measured_bytes=1.1e8)
    assert again.to_json() == corrections.to_json()


@pytest.mark.parametrize(
    "text", ['{"phone": 1.1}', '{"phone": [9.0, 3]}', '{"phone": ["a", 3]}', "[]", "{"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"phone|table of classes|Expecting"):
        MemoryCorrections.from_json(text)
