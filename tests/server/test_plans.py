# SPDX-License-Identifier: Apache-2.0
"""From an assignment to a plan, and to what its update must hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.server.federation import LABELS, TinyChoice, make_space, profile, run_config

from lorikit.proto.plan import Operation
from lorikit.server.errors import CompileError
from lorikit.server.methods.base import Assignment
from lorikit.server.plans import (
    assignment_from_json,
    assignment_to_json,
    build_plan,
    expected_from_json,
    expected_to_json,
    expected_update,
    identifier,
    largest_update_bytes,
    missing_operations,
    seed_of,
)

ADAPTER = make_space(4).tensors
QUERY = "encoder.layer.{}.query"
PENALTY = Operation(name="tail_penalty", arguments={"weight": 5e-4, "keep": 0.99, "min_rank": 2})
PRUNE = Operation(name="prune_tail", arguments={"keep": 0.99, "min_rank": 2})
SUMS = Operation(name="class_sums", arguments={"max_examples": 0})


def assignment(**changes):
    fields = {
        "device_id": "d1",
        "ranks": {QUERY.format(0): 3, QUERY.format(1): 4},
        "trained_layers": (0, 1),
        "kept_layers": (0, 1),
    }
    return Assignment(**{**fields, **changes})


@pytest.fixture
def plan_of(tmp_path):
    def plan_of(wanted, *, number=0, device=None, **settings):
        config = run_config(tmp_path, **settings)
        return build_plan(
            config, wanted, TinyChoice(), ADAPTER, device or profile(), round_number=number
        )

    return plan_of


def test_plan_trains_the_tensors_of_the_trained_layers(plan_of):
    (phase,) = plan_of(assignment(trained_layers=(1,))).phases

    assert phase.train == (
        "encoder.layer.1.query.lora_A.weight",
        "encoder.layer.1.query.lora_B.weight",
        "classifier.weight",
        "classifier.bias",
    )
    assert (phase.steps, phase.batch_size, phase.micro_batch) == (3, 4, 1)


def test_roles_and_head_are_left_out_where_the_method_says_so(plan_of):
    plan = plan_of(assignment(train_roles=("lora_A", "head"), train_head=False))

    assert plan.phases[0].train == plan.send
    assert all(name.endswith("lora_A.weight") for name in plan.send)


def test_plan_without_training_sends_what_its_operations_make(plan_of):
    wanted = assignment(train=False, operations=(SUMS,))
    plan = plan_of(wanted)
    expected = expected_update(plan, wanted, ADAPTER, classes=len(LABELS))

    assert plan.phases == ()
    assert plan.send == ("statistics.class_sums", "statistics.class_counts")
    assert {name: t.shape for name, t in expected.items()} == {
        "statistics.class_sums": (3, 6),
        "statistics.class_counts": (3,),
    }


def test_equal_arguments_give_equal_plans_and_rounds_differ(plan_of):
    first = plan_of(assignment())

    assert plan_of(assignment()) == first
    assert plan_of(assignment(), number=1).seed != first.seed
    assert plan_of(assignment(device_id="d2")).seed != first.seed
    assert plan_of(assignment(), seed=8).seed != first.seed


def test_codec_falls_back_to_what_the_device_has(plan_of):
    old = profile(codecs=("fp32",))

    assert plan_of(assignment(), codec="fp16").codec == "fp16"
    assert plan_of(assignment(), codec="fp16", device=old).codec == "fp32"


def test_tensor_without_a_gradient_is_not_trained_silently(tmp_path):
    frozen = [replace(tensor, trained=False) for tensor in ADAPTER]

    with pytest.raises(CompileError, match=r"layer\.0\.query\.lora_A"):
        build_plan(
            run_config(tmp_path), assignment(), TinyChoice(), frozen, profile(), round_number=0
        )


def test_operations_that_a_device_lacks_are_listed(plan_of):
    plan = plan_of(assignment(gradient_operations=(PENALTY,), operations=(PRUNE,)))

    assert missing_operations(plan, profile()) == ()
    assert missing_operations(plan, profile(operations=("prune_tail@1",))) == ("tail_penalty@1",)
    assert missing_operations(plan, profile(operations=("prune_tail@2",))) == (
        "prune_tail@1",
        "tail_penalty@1",
    )


def test_update_has_the_assigned_ranks_and_smaller_ones_only_after_pruning(plan_of):
    plain, wanted = assignment(), assignment(operations=(PRUNE,))
    assert {
        t.rank_axis
        for t in expected_update(plan_of(plain), plain, ADAPTER, classes=len(LABELS)).values()
    } == {None}
    expected = expected_update(plan_of(wanted), wanted, ADAPTER, classes=len(LABELS))

    assert expected["encoder.layer.0.query.lora_A.weight"].shape == (3, 6)
    assert expected["encoder.layer.1.query.lora_B.weight"].shape == (7, 4)
    assert expected["encoder.layer.1.query.lora_B.weight"].rank_axis == 1
    assert expected["classifier.bias"].rank_axis is None


def test_update_bytes_are_bounded_by_the_plan(plan_of):
    wanted = assignment()
    expected = expected_update(plan_of(wanted), wanted, ADAPTER, classes=len(LABELS))
    elements = 3 * 6 + 7 * 3 + 4 * 6 + 7 * 4 + 3 * 6 + 3

    assert 4 * elements < largest_update_bytes(expected) < 4 * elements + 8192


def test_assignment_and_expectation_survive_the_store(plan_of):
    wanted = assignment(
        gradient_operations=(PENALTY,),
        operations=(Operation(name="select", arguments={"rows": (1, 2), "names": ("a",)}),),
    )
    expected = expected_update(plan_of(wanted), wanted, ADAPTER, classes=len(LABELS))

    assert assignment_from_json(assignment_to_json(wanted)) == wanted
    assert expected_from_json(expected_to_json(expected)) == expected


def test_seeds_and_names_depend_on_every_part():
    parts = [("a", 1), ("a", 2), ("b", 1), ("a", 1, ""), ("a1",), (1, "a")]

    assert len({seed_of(*p) for p in parts}) == len({identifier(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 1 << 63 for p in parts)
    assert seed_of("a", 1) == seed_of("a", 1)
