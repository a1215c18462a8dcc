# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

from lorikit.server.report_drift import drift_chart, drift_rows, read_drift, write_drift
from lorikit.server.report_html import render


def drift(precision: str, error: float, after: float) -> dict[str, object]:
    return {
        "precision": precision,
        "devices": 2,
        "weight": 0.5,
        "base_error": error,
        "base_error_after": after,
        "repair": error / 2,
        "repair_after": after / 2,
        "pull": 0.1,
        "pull_after": 0.1,
    }


def rounds(*precisions: str) -> list[dict[str, object]]:
    errors = {"int8": 0.01, "nf4": 0.1}
    return [
        {
            "round": number,
            "metric": None,
            "devices": [],
            "drift": [drift(p, errors[p] * (1 + number), errors[p] / 2) for p in precisions],
        }
        for number in range(2)
    ]


def test_drift_is_kept_by_round(tmp_path: Path) -> None:
    write_drift(tmp_path, 3, [drift("nf4", 0.1, 0.05)])

    assert read_drift(tmp_path, 3) == [drift("nf4", 0.1, 0.05)]
    assert read_drift(tmp_path, 4) == []
    assert [path.name for path in (tmp_path / "drift").iterdir()] == ["round-0003.json"]


def test_rows_are_means_over_rounds_with_the_finest_base_first() -> None:
    rows = drift_rows(rounds("nf4", "int8"))

    assert [row.precision for row in rows] == ["int8", "nf4"]
    # Rounds give 0.1 and 0.2.
    assert abs(rows[1].means["base_error"] - 0.15) < 1e-12


def test_bars_are_as_long_as_the_shares_they_stand_for() -> None:
    picture = drift_chart(drift_rows(rounds("nf4", "int8")))

    assert picture.count("<rect") == 2 * 3 * 2
    assert "nf4, before correction: 15.00 %" in picture
    assert "nf4, after correction: 5.00 %" in picture


def test_the_page_shows_bases_only_where_they_differ() -> None:
    mixed = render({"method": "fedit", "rounds": rounds("nf4", "int8")})
    same = render({"method": "fedit", "rounds": rounds("nf4")})

    assert "Bases of different precisions" in mixed
    assert "Bases of different precisions" not in same
