# SPDX-License-Identifier: Apache-2.0
"""A plan that breaks a rule is refused with the field and the value in the message."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lorikit.proto.plan import Operation, OptimizerConfig, Phase, Plan, PlanError, WireScheme


def phase(**changes: object) -> Phase:
    fields = {"train": ("a",), "steps": 3, "batch_size": 8, "micro_batch": 2, **changes}
    return Phase(**fields)  # type: ignore[arg-type]  # wrong ones on purpose


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "adam"}, "optimizer.name must be adamw, sgd or mezo, got 'adam'"),
        ({"state_bits": 4}, "optimizer.state_bits must be 8 or 32, got 4"),
        ({"perturbation": 0.0}, "optimizer.perturbation must be positive, got 0.0"),
        ({"directions": 0}, "directions must be at least 1 .* got 0 and 0"),
        ({"seeds": -1}, "seeds at least 0, got 1 and -1"),
        ({"name": "mezo", "clip_norm": 1.0}, r"optimizer mezo has no clip_norm, got 1\.0"),
        ({"name": "mezo", "weight_decay": 0.1}, "optimizer mezo has no weight_decay"),
        ({"name": ""}, "got ''"),
        ({"schedule": "step"}, "optimizer.schedule is unknown: 'step'"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be positive, got inf"),
        ({"beta1": 1.0}, r"optimizer.beta1 must lie in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, "optimizer.beta2"),
        ({"momentum": math.nan}, "optimizer.momentum"),
        ({"epsilon": 0.0}, "optimizer.epsilon must be positive"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay must be at least 0, got -1.0"),
        ({"clip_norm": math.inf}, "optimizer.clip_norm"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps"),
    ],
)
def test_optimizer_out_of_range_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        dataclasses.replace(OptimizerConfig(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": ()}, "phase 'train' trains nothing"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 10_000_001}, "steps must be at most 10000000, got 10000001"),
        ({"batch_size": 65_537}, "batch_size must be at most 65536, got 65537"),
        ({"micro_batch": 0}, "micro_batch must lie in 1..8"),
        ({"micro_batch": 9}, r"micro_batch must lie in 1..8 \(batch_size\), got 9"),
        ({"batch_size": 0}, "micro_batch must lie in 1..0"),
        (
            {"optimizer": OptimizerConfig(name="mezo", directions=2), "steps": 2**23 + 1},
            "mezo has at most 16777216 directions, got 16777218",
        ),
        ({"learning_rate_factors": {"lora_B": math.nan}}, r"factors\['lora_B'\].*got nan"),
        ({"learning_rate_factors": {"head": -1.0}}, r"factors\['head'\].*got -1.0"),
    ],
)
def test_phase_out_of_range_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        phase(**changes)


def test_plan_of_another_version_is_refused() -> None:
    with pytest.raises(PlanError, match="plan version 2 is not 1; update the SDK"):
        Plan(version=2, method="fedit", phases=(phase(),))


def test_plan_that_does_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="neither phases nor operations"):
        Plan(method="fedit")


def test_plan_of_operations_alone_is_accepted() -> None:
    plan = Plan(method="fedit", operations=(Operation(name="class_sums"),))

    assert plan.phases == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": (1 << 20) + 1}, "max_length must be at most 1048576, got 1048577"),
        ({"inputs": {"lora_scale": math.inf}}, r"inputs\['lora_scale'\] must be finite, got inf"),
    ],
)
def test_plan_out_of_range_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        dataclasses.replace(Plan(method="fedit", phases=(phase(),)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "wire scheme version 2 is not 1; update the SDK"),
        ({"codec": ""}, "wire.codec is empty"),
        ({"rotation_block": 3}, "rotation_block must be 0 or a power of two up to 65536, got 3"),
        ({"rotation_block": 1}, "got 1"),
        ({"rotation_block": 1 << 17}, "got 131072"),
        ({"top_share": 0.0}, r"top_share must lie in \(0, 1\], got 0.0"),
        ({"top_share": math.nan}, "got nan"),
        ({"codec": "adaptive"}, "budget_bytes belongs to codec adaptive"),
        ({"budget_bytes": 9}, "got 9 with codec 'int4'"),
        ({"error_feedback": True}, "needs delta and the name of a stream"),
        ({"error_feedback": True, "stream": "r", "delta": False}, "needs delta"),
        ({"round": 3, "counted_round": 3}, "counted_round must lie in 0..2, got 3"),
    ],
)
def test_wire_scheme_out_of_range_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        WireScheme(**{"codec": "int4", **changes})  # type: ignore[arg-type]  # wrong ones on purpose
