# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from lorikit.server.methods.base import Assignment, Participant
from lorikit.server.planner.choice import DoesNotFitError
from lorikit.server.refusals import instead

TOO_LARGE = DoesNotFitError("The smallest plan needs 90 MiB.", "Allow the app 95 MiB.")


def small_device(**limits: int) -> Participant:
    values = {"max_rank": 8, "max_depth": 4, "max_layers": 4, **limits}
    return Participant(
        device_id="phone-3", memory_limit_bytes=1 << 20, seconds_per_step=1.0, **values
    )


WORK = Assignment(
    device_id="phone-3",
    ranks={"query": 8},
    trained_layers=(0, 1, 2, 3),
    kept_layers=(0, 1, 2, 3),
)


@pytest.mark.parametrize(
    ("method", "limits", "sentence"),
    [
        ("fedit", {"max_rank": 2}, "fits 2 ranks, all get 8; use flexlora or hetlora, which do."),
        ("flora", {"max_depth": 1}, "fits 1 trained layers, all get 4; use legend, which do."),
        ("legend", {"max_layers": 3}, "fits 3 layers, all get 4; use fedra, which do."),
        ("lora-a2", {"max_layers": 3}, "fits 3 layers, all get 4; use fedra, which do."),
    ],
)
def test_a_refusal_names_methods_that_take_such_a_device(
    method: str, limits: dict[str, int], sentence: str
) -> None:
    refusal = instead(TOO_LARGE, method, small_device(**limits), WORK)

    assert refusal.reason == TOO_LARGE.reason
    assert refusal.remedy.startswith("Allow the app 95 MiB. ")
    assert refusal.remedy.endswith(sentence)


@pytest.mark.parametrize("method", ["flora", "hetlora", "of-your-own"])
def test_where_no_other_method_would_help_the_refusal_stays(method: str) -> None:
    assert instead(TOO_LARGE, method, small_device(max_rank=2), WORK) is TOO_LARGE
