# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.hetlora import HetLoRA, HetLoRAConfig

Devices = Callable[..., Participant]
RNG = np.random.default_rng(0)

A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "classifier.bias"
TINY = AdapterSpace(
    tensors=(
        AdapterTensor(name=A, role="lora_A", module="m", layer=0, shape=("rank", 3), trained=True),
        AdapterTensor(name=B, role="lora_B", module="m", layer=0, shape=(2, "rank"), trained=True),
        AdapterTensor(
            name=HEAD, role="head", module="classifier", layer=-1, shape=(1,), trained=True
        ),
    ),
    layer_count=1,
    max_rank=2,
)
OLD: Tensors = {
    A: np.full((2, 3), 7, np.float32),
    B: np.full((2, 2), 7, np.float32),
    HEAD: np.full(1, 7, np.float32),
}


def assert_close(values: np.ndarray, wanted: list[list[float]]) -> None:
    np.testing.assert_allclose(values, np.array(wanted), rtol=1e-6)


def update(
    device_id: str, a: object, b: object, head: float = 0.0, examples: int = 1
) -> Contribution:
    tensors = {A: np.array(a, np.float32), B: np.array(b, np.float32)}
    tensors[HEAD] = np.array([head], np.float32)
    rank = tensors[A].shape[0]
    assignment = Assignment(
        device_id=device_id, ranks={"m": 2}, trained_layers=(0,), kept_layers=(0,)
    )
    return Contribution(
        device_id=device_id,
        assignment=assignment,
        tensors=tensors,
        scalars={"rank": float(rank)},
        examples=examples,
    )


# One device of rank 2 with ||B A||_F = ||[[3,0,0],[0,4,0]]|| = 5,
# one of rank 1 with ||B A||_F = ||[[0,0,15],[0,0,0]]|| = 15: weights 1/4 and 3/4.
TWO = update("two", [[3, 0, 0], [0, 4, 0]], [[1, 0], [0, 1]], head=1.0, examples=30)
ONE = update("one", [[0, 0, 5]], [[3], [0]], head=5.0, examples=10)


def aggregated(config: HetLoRAConfig, *updates: Contribution, state: State | None = None) -> State:
    return HetLoRA(config).aggregate(state or State(tensors=OLD), TINY, updates)


def test_weights_are_the_norms_and_small_ranks_are_padded_with_zeros() -> None:
    tensors = aggregated(HetLoRAConfig(), TWO, ONE).tensors

    assert_close(tensors[A], [[3 / 4, 0, 15 / 4], [0, 1, 0]])
    assert_close(tensors[B], [[1 / 4 + 9 / 4, 0], [0, 1 / 4]])


def test_the_head_is_averaged_by_data_size() -> None:
    assert aggregated(HetLoRAConfig(), TWO, ONE).tensors[HEAD].tolist() == [2.0]


def test_norms_and_data_sizes_can_both_count() -> None:
    tensors = aggregated(HetLoRAConfig(weighting="norm-data"), TWO, ONE).tensors

    assert_close(tensors[A], [[3 / 2, 0, 5 / 2], [0, 2, 0]])  # 150 : 150


def test_data_sizes_alone_are_plain_zero_padding() -> None:
    tensors = aggregated(HetLoRAConfig(weighting="data"), TWO, ONE).tensors

    assert_close(tensors[A], [[9 / 4, 0, 5 / 4], [0, 3, 0]])


def test_rows_can_be_averaged_over_their_holders() -> None:
    tensors = aggregated(HetLoRAConfig(rows="holders"), TWO, ONE).tensors

    assert_close(tensors[A], [[3 / 4, 0, 15 / 4], [0, 4, 0]])
    assert_close(tensors[B], [[1 / 4 + 9 / 4, 0], [0, 1]])


def test_a_rank_that_nobody_owns_becomes_zero_or_stays() -> None:
    padded = aggregated(HetLoRAConfig(), ONE).tensors
    owned = aggregated(HetLoRAConfig(rows="holders"), ONE).tensors

    assert padded[A].tolist() == [[0, 0, 5], [0, 0, 0]]
    assert owned[A].tolist() == [[0, 0, 5], [7, 7, 7]]


def test_data_sizes_count_while_every_product_is_zero() -> None:
    first = update("a", [[1, 0, 0], [0, 1, 0]], [[0, 0], [0, 0]], examples=3)
    second = update("b", [[5, 0, 0]], [[0], [0]], examples=1)

    tensors = aggregated(HetLoRAConfig(), first, second).tensors

    assert_close(tensors[A], [[2, 0, 0], [0, 3 / 4, 0]])
    assert not tensors[B].any()


def test_a_device_without_a_product_counts_for_nothing_beside_one_that_has() -> None:
    silent = update("a", [[9, 9, 9]], [[0], [0]], examples=100)

    tensors = aggregated(HetLoRAConfig(), silent, ONE).tensors

    assert tensors[A].tolist() == [[0, 0, 5], [0, 0, 0]]


def test_a_diverging_device_is_limited_by_the_median_of_the_round_before() -> None:
    state = aggregated(HetLoRAConfig(norm_limit=1.0), TWO)
    assert state.scalars == {"median_norm": 5.0}

    tensors = aggregated(HetLoRAConfig(norm_limit=1.0), TWO, ONE, state=state).tensors

    assert_close(tensors[A], [[3 / 2, 0, 5 / 2], [0, 2, 0]])  # 5 : 5


def test_norms_can_count_module_by_module(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Callable[..., Contribution]
) -> None:
    method = HetLoRA(HetLoRAConfig(granularity="module"))
    state = method.start(space, initial)
    cohort = [device("a"), device("b")]
    first, second = (
        trainer(method, state, space, a, seed=i)
        for i, a in enumerate(method.assign(state, space, 0, cohort, RNG))
    )

    tensors = method.aggregate(state, space, [first, second]).tensors

    for a, b in space.pairs():
        one, two = (np.linalg.norm(u.tensors[b.name] @ u.tensors[a.name]) for u in (first, second))
        wanted = (one * first.tensors[a.name] + two * second.tensors[a.name]) / (one + two)
        np.testing.assert_allclose(tensors[a.name], wanted, rtol=1e-5, atol=1e-5)


def test_one_norm_over_all_modules_by_default(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Callable[..., Contribution]
) -> None:
    method = HetLoRA()
    state = method.start(space, initial)
    cohort = [device("a"), device("b")]
    first, second = (
        trainer(method, state, space, a, seed=i)
        for i, a in enumerate(method.assign(state, space, 0, cohort, RNG))
    )

    tensors = method.aggregate(state, space, [first, second]).tensors

    one, two = (
        sum(np.linalg.norm(u.tensors[b.name] @ u.tensors[a.name]) ** 2 for a, b in space.pairs())
        ** 0.5
        for u in (first, second)
    )
    for a, _ in space.pairs():
        wanted = (one * first.tensors[a.name] + two * second.tensors[a.name]) / (one + two)
        np.testing.assert_allclose(tensors[a.name], wanted, rtol=1e-5, atol=1e-5)


def ranks(method: HetLoRA, state: State, space: AdapterSpace, *cohort: Participant) -> list[int]:
    return [set(a.ranks.values()).pop() for a in method.assign(state, space, 0, cohort, RNG)]


def test_ranks_follow_memory_budgets(spaces: Callable[..., AdapterSpace], device: Devices) -> None:
    space = spaces(max_rank=50)
    cohort = [
        device(f"d{i}", memory_limit_bytes=budget) for i, budget in enumerate((100, 50, 25, 1))
    ]

    assert ranks(HetLoRA(HetLoRAConfig(min_rank=5)), State(tensors={}), space, *cohort) == [
        50, 25, 12, 5,
    ]  # fmt: skip


def test_ranks_can_be_spread_over_budgets_that_differ_by_orders_of_magnitude(
    spaces: Callable[..., AdapterSpace], device: Devices
) -> None:
    method = HetLoRA(HetLoRAConfig(budget_exponent=0.4))
    cohort = [device(f"d{i}", memory_limit_bytes=b) for i, b in enumerate((256, 512, 2000, 8000))]

    assert ranks(method, State(tensors={}), spaces(max_rank=8), *cohort) == [2, 3, 5, 8]


def test_a_rank_is_held_and_only_falls(space: AdapterSpace, device: Devices) -> None:
    state = State(tensors={}, devices={"a": {"rank": 4.0}})

    assert ranks(HetLoRA(), state, space, device("a"), device("b")) == [4, 6]
    assert ranks(HetLoRA(), state, space, device("a", max_rank=3), device("b")) == [3, 6]


def test_no_rank_is_above_what_fits(space: AdapterSpace, device: Devices) -> None:
    assert ranks(HetLoRA(), State(tensors={}), space, device("a", max_rank=3)) == [3]


def test_ranks_can_be_what_fits_or_drawn(
    spaces: Callable[..., AdapterSpace], device: Devices
) -> None:
    space = spaces(max_rank=50)
    fit = HetLoRA(HetLoRAConfig(rank_rule="fit"))
    drawn = HetLoRA(HetLoRAConfig(rank_rule="power-law", min_rank=5))
    cohort = [device(f"d{i}") for i in range(400)]

    assert ranks(fit, State(tensors={}), space, device("a", max_rank=9), device("b")) == [9, 50]
    numbers = ranks(drawn, State(tensors={}), space, *cohort)
    assert min(numbers) == 5
    assert max(numbers) > 40
    assert np.median(numbers) == 5  # P(r = r_min) = (1 / 46) ** 0.1 = 0.68


def test_the_pruned_rank_is_remembered() -> None:
    assert aggregated(HetLoRAConfig(), TWO, ONE).devices == {
        "two": {"rank": 2.0},
        "one": {"rank": 1.0},
    }


def test_the_plan_penalises_and_prunes_the_tail(space: AdapterSpace, device: Devices) -> None:
    method = HetLoRA(HetLoRAConfig(penalty=8e-3))
    [assignment] = method.assign(State(tensors={}), space, 0, [device("a")], RNG)

    [penalty] = assignment.gradient_operations
    [prune] = assignment.operations
    assert penalty.name == "tail_penalty"
    assert penalty.arguments == {"weight": 1e-3, "keep": 0.99, "min_rank": 2}  # eight modules
    assert prune.name == "prune_tail"
    assert prune.arguments == {"keep": 0.99, "min_rank": 2}


@pytest.mark.parametrize(
    ("options", "max_rank"),
    [({"gamma": 1.0}, 64), ({"min_rank": 6}, 64), ({}, 2)],
    ids=["gamma 1", "at r_min", "fits r_min only"],
)
def test_no_penalty_and_no_pruning_without_a_tail(
    options: Mapping[str, float], max_rank: int, space: AdapterSpace, device: Devices
) -> None:
    method = HetLoRA(HetLoRAConfig(**options))  # type: ignore[arg-type]  # int or float by name
    [assignment] = method.assign(State(tensors={}), space, 0, [device("a", max_rank=max_rank)], RNG)

    assert assignment.gradient_operations == ()
    assert assignment.operations == ()


def test_devices_get_the_leading_ranks(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = HetLoRA()
    state = method.start(space, initial)
    [assignment] = method.assign(state, space, 0, [device("a", max_rank=3)], RNG)

    sent = method.broadcast(state, space, assignment)

    for a, b in space.pairs():
        assert np.array_equal(sent[a.name], initial[a.name][:3])
        assert np.array_equal(sent[b.name], initial[b.name][:, :3])


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0},
        {"gamma": 1.1},
        {"penalty": -1.0},
        {"norm_limit": float("nan")},
        {"weighting": "norms"},
        {"granularity": "layer"},
        {"rows": "all"},
        {"rank_rule": "best"},
        {"min_rank": 0},
        {"reference_bytes": -1},
        {"budget_exponent": 0.0},
        {"law_exponent": float("inf")},
    ],
)
def test_bad_options_are_refused_with_their_value(options: dict[str, object]) -> None:
    [value] = options.values()
    with pytest.raises(ValueError, match=str(value)):
        HetLoRAConfig(**options)  # type: ignore[arg-type]  # wrong on purpose


def test_a_smallest_rank_above_the_largest_is_refused(space: AdapterSpace, device: Devices) -> None:
    with pytest.raises(ValueError, match="min_rank 9 is above the largest rank 6"):
        HetLoRA(HetLoRAConfig(min_rank=9)).assign(State(tensors={}), space, 0, [device("a")], RNG)
