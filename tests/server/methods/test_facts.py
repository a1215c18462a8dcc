# SPDX-License-Identifier: Apache-2.0
"""What is said of a method against what it does: bytes, roles, differences, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.server.federation import TinyChoice, profile, run_config

from lorikit.proto.tensors import Tensors
from lorikit.server.methods import FACTS, METHODS, build_method
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant, State
from lorikit.server.methods.facts import ALTERNATIVES, Difference, MethodFacts
from lorikit.server.plans import build_plan, expected_update

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]

NAMES = sorted(METHODS)
ROUNDS = 4
HEAD = 3 * 5 + 3
ONE_RANK = 4 * ((5 + 9) + (9 + 5))
"""Parameters of one rank of every pair of the small model."""
FIRST_ROUND = [
    ("fedit", 6 * ONE_RANK, 6 * ONE_RANK),
    ("hetlora", 6 * ONE_RANK, 6 * ONE_RANK),
    ("flexlora", 6 * ONE_RANK, 6 * ONE_RANK),
    ("lora-fair", 6 * ONE_RANK, 6 * ONE_RANK),
    ("legend", (3 + 4 + 5 + 6) * 28, (3 + 4 + 5 + 6) * 28),
    ("fedra", 6 * ONE_RANK, 6 * ONE_RANK),
    ("ffa-lora", 6 * 4 * (9 + 5), 6 * ONE_RANK),
    ("rolora", 6 * 4 * (9 + 5), 6 * ONE_RANK),
    ("flora", 6 * ONE_RANK, (6 + 1) * ONE_RANK),
    ("fedex-lora", 6 * ONE_RANK, (6 + 1) * ONE_RANK),
    ("frlora", 6 * ONE_RANK, (6 + 5) * ONE_RANK),  # a 9 x 5 matrix has rank 5
    ("lora-a2", 6 * 4 * (9 + 5), (6 + 1) * ONE_RANK),
    ("fedbf", 4 * (9 + 5), 2 * 4 * (9 + 5)),
    ("fedpeft-bias", 4 * (9 + 5), 2 * 4 * (9 + 5)),
]
"""Parameters beside the head that a device sends and gets in the first round, by method."""


def cohort(device: Devices) -> list[Participant]:
    return [
        device("a", memory_limit_bytes=6, max_layers=2, max_depth=4, seconds_per_step=1.0),
        device("b", memory_limit_bytes=3, max_layers=3, max_depth=2, seconds_per_step=2.0),
    ]


def updates_of(
    method_name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> list[tuple[int, State, Assignment, Contribution]]:
    """Some rounds of two unlike devices: round, state before it, work, update."""
    method = build_method(method_name)
    state = method.start(space, initial)
    seen = []
    for number in range(ROUNDS):
        work = method.assign(state, space, number, cohort(device), np.random.default_rng(number))
        updates = [
            trainer(method, state, space, a, seed=10 * number + i) for i, a in enumerate(work)
        ]
        seen += [(number, state, a, u) for a, u in zip(work, updates, strict=True)]
        state = method.aggregate(state, space, updates)
    return seen


def ranks_of(assignment: Assignment, received: Tensors, space: AdapterSpace) -> dict[str, int]:
    """Rank by module, those of the base deltas as they were sent."""
    deltas = {t.module: received[t.name].shape[0] for t in space.named("delta_A")}
    return {**assignment.ranks, **deltas}


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_broadcast_and_expected_update(
    name: str,
    space: AdapterSpace,
    initial: Tensors,
    device: Devices,
    trainer: Trainer,
    tmp_path: Path,
) -> None:
    method, config = build_method(name), run_config(tmp_path)
    for number, state, work, update in updates_of(name, space, initial, device, trainer):
        plan = build_plan(config, work, TinyChoice(), space.tensors, profile(), round_number=number)
        expected = expected_update(plan, work, space.tensors, classes=3)
        received = method.broadcast(state, space, work)

        cost = FACTS[name].cost(
            space,
            ranks_of(work, received, space),
            trained_layers=work.trained_layers,
            kept_layers=work.kept_layers,
            round_number=number,
        )

        assert cost.up == sum(4 * int(np.prod(t.shape)) for t in expected.values())
        assert cost.up == sum(values.nbytes for values in update.tensors.values())
        assert cost.down == sum(values.nbytes for values in received.values())


@pytest.mark.parametrize(("name", "up", "down"), FIRST_ROUND)
def test_the_first_round_costs_what_the_formula_says_by_hand(
    name: str, up: int, down: int, space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = build_method(name)
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], np.random.default_rng(0))
    received = method.broadcast(state, space, work)

    cost = FACTS[name].cost(space, ranks_of(work, received, space))

    assert (cost.up, cost.down) == (4 * (up + HEAD), 4 * (down + HEAD))


def test_every_method_has_a_row_of_its_hand_worked_costs() -> None:
    assert sorted(name for name, _, _ in FIRST_ROUND) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_device_trains_the_roles_that_the_facts_name(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    facts = FACTS[name]
    for number, _, work, _ in updates_of(name, space, initial, device, trainer):
        trained = {tensor.role for tensor in space.named(*work.train_roles)}
        named = {t.role for t in space.named(*facts.sent_roles[number % len(facts.sent_roles)])}
        assert trained == named


@pytest.mark.parametrize("name", NAMES)
def test_devices_differ_in_what_the_facts_accept_and_in_nothing_else(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    seen = updates_of(name, space, initial, device, trainer)
    differ = set()
    for number in range(ROUNDS):
        one, other = (work for at, _, work, _ in seen if at == number)
        if one.kept_layers != other.kept_layers:
            differ.add("layers")
        elif one.trained_layers != other.trained_layers:
            differ.add("depths")
        elif dict(one.ranks) != dict(other.ranks):
            differ.add("ranks")

    assert differ == set(FACTS[name].accepts)


def test_methods_that_a_refusal_names_accept_the_difference() -> None:
    for difference, names in ALTERNATIVES.items():
        assert names
        for name in names:
            assert difference in FACTS[name].accepts
            assert not FACTS[name].needs


@pytest.mark.parametrize(
    "name", ["fedit", "ffa-lora", "rolora", "lora-fair", "fedex-lora", "frlora"]
)
def test_an_update_of_another_rank_is_refused_with_methods_that_take_it(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = build_method(name)
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], np.random.default_rng(0))
    update = trainer(method, state, space, work)
    b = space.pairs()[0][1].name
    short = replace(update, tensors={**update.tensors, b: update.tensors[b][:, :2]})

    with pytest.raises(ValueError, match=r"differ in ranks: device a .*; use flexlora or hetlora"):
        method.aggregate(state, space, [short])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("difference", "changes", "sentence"),
    [
        ("depths", {"trained_layers": (3,)}, "device b trained 1 layers, a 4; use legend"),
        (
            "layers",
            {"trained_layers": (3,), "kept_layers": (3,)},
            r"device b held the layers \(3,\), a \(0, 1, 2, 3\); use fedra",
        ),
    ],
)
def test_an_update_that_differs_is_refused_with_a_method_that_takes_it(
    name: str,
    difference: Difference,
    changes: dict[str, tuple[int, ...]],
    sentence: str,
    space: AdapterSpace,
    initial: Tensors,
    device: Devices,
    trainer: Trainer,
) -> None:
    method = build_method(name)
    state = method.start(space, initial)
    one, other = method.assign(
        state, space, 0, [device("a"), device("b")], np.random.default_rng(0)
    )
    updates = [trainer(method, state, space, w) for w in (one, replace(other, **changes))]  # type: ignore[arg-type]  # layers

    if FACTS[name].takes(difference):
        method.aggregate(state, space, updates)
        return
    with pytest.raises(ValueError, match=sentence):
        method.aggregate(state, space, updates)


def test_devices_that_cannot_do_the_common_work_hear_which_method_would_suit_them(
    device: Devices,
) -> None:
    devices = [
        device("small", max_rank=2),
        device("shallow", max_depth=1),
        device("tiny", max_layers=3, max_depth=0),
        device("fine"),
    ]

    fedit = FACTS["fedit"].unmet(devices, rank=6, depth=4, layers=4)
    hetlora = FACTS["hetlora"].unmet(devices, rank=6, depth=4, layers=4)

    assert fedit.keys() == {"small", "shallow", "tiny"}
    assert "fits 2 ranks, all get 6; use flexlora or hetlora" in fedit["small"]
    assert "use legend" in fedit["shallow"]
    assert "use fedra" in fedit["tiny"]
    assert hetlora.keys() == {"shallow", "tiny"}


@pytest.mark.parametrize("name", [n for n in NAMES if FACTS[n].needs])
def test_a_package_without_what_a_method_needs_is_refused_with_a_way_out(
    name: str, space: AdapterSpace, initial: Tensors
) -> None:
    bare = replace(space, tensors=space.named("lora_A", "lora_B", "head"))
    instead = "flexlora or hetlora" if "ranks" in FACTS[name].accepts else "fedit"

    with pytest.raises(ValueError, match=f"{FACTS[name].needs[0]}.*compile the model.*{instead}"):
        build_method(name).start(bare, initial)


def test_the_alternation_of_a_method_shows_in_its_cost(space: AdapterSpace) -> None:
    facts: MethodFacts = FACTS["rolora"]
    ranks = {a.module: 2 for a, _ in space.pairs()}

    even, odd = (facts.cost(space, ranks, round_number=n) for n in (0, 1))
    frozen_head = facts.cost(space, ranks, roles=("lora_B",))

    assert even.up == odd.up == 4 * (2 * 4 * (9 + 5) + HEAD)  # 5 -> 9 and 9 -> 5
    assert even.up - frozen_head.up == 4 * HEAD
