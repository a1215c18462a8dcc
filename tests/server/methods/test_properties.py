# SPDX-License-Identifier: Apache-2.0
"""What must hold for every method, whatever it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.methods import METHODS, build_method
from lorikit.server.methods.base import AdapterSpace, Contribution, Method, Participant, State
from lorikit.server.methods.base_delta import DELTA_ROLES, delta_tensors
from lorikit.server.methods.head_start import HeadStart
from lorikit.server.methods.server_optimizer import ServerOptimizer
from lorikit.server.methods.state import pack_state, unpack_state

Trainer = Callable[..., Contribution]
Devices = Callable[..., Participant]

NAMES = sorted(METHODS)
STARTED_ANEW = ("flexlora", "flora", "frlora")
"""Methods whose factors after a round are not the mean of those that were sent."""
BUDGETS = (1 << 28, 1 << 29, 1 << 31, 1 << 33)


def options(name: str) -> dict[str, object]:
    """Every layer trains, so that there is one product to compare with."""
    return {"capacity": "budget"} if name == "fedra" else {}


def fleet(device: Devices, count: int = 4) -> list[Participant]:
    return [
        device(
            f"device-{i}",
            memory_limit_bytes=BUDGETS[i % 4],
            max_layers=1 + i,
            max_depth=1 + i,
            seconds_per_step=4.0 - i,
        )
        for i in range(count)
    ]


def play(
    method: Method,
    state: State,
    space: AdapterSpace,
    cohort: Sequence[Participant],
    trainer: Trainer,
    round_number: int = 0,
) -> tuple[State, list[Contribution]]:
    rng = np.random.default_rng([5, round_number])
    assignments = method.assign(state, space, round_number, cohort, rng)
    updates = [
        trainer(method, state, space, a, examples=10 + 7 * i, seed=100 * round_number + i)
        for i, a in enumerate(assignments)
    ]
    return method.aggregate(state, space, iter(updates)), updates


def products(
    adapter: Tensors,
    space: AdapterSpace,
    scale: float = 2.0,
    pairs: Sequence[tuple[AdapterTensor, AdapterTensor]] | None = None,
) -> dict[str, np.ndarray]:
    """What each module adds to the frozen weight: s B A and the base delta."""
    out = {}
    wide = {name: values.astype(np.float64) for name, values in adapter.items()}
    for a, b in space.pairs() if pairs is None else pairs:
        out[a.module] = scale * wide[b.name] @ wide[a.name]
        delta_a, delta_b = delta_tensors(a, b)
        if delta_a.name in adapter:
            out[a.module] = out[a.module] + wide[delta_b.name] @ wide[delta_a.name]
    return out


def local_adapter(
    method: Method, state: State, space: AdapterSpace, update: Contribution
) -> Tensors:
    """What the device ended with: what it received, with what it trained."""
    return {**method.broadcast(state, space, update.assignment), **update.tensors}


def plain(name: str) -> Method:
    return build_method(name)


@pytest.mark.parametrize("name", NAMES)
def test_one_device_is_local_training(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = plain(name)
    state = method.start(space, initial)
    for round_number in range(3):
        before = state
        state, [update] = play(method, state, space, [device("a")], trainer, round_number)

        adapter = method.global_adapter(state, space)

        local = products(local_adapter(method, before, space, update), space)
        for module, product in products(adapter, space).items():
            np.testing.assert_allclose(product, local[module], atol=1e-4)  # float32 factors
        for tensor in space.tensors:
            if tensor.role in ("head", "bias", "norm") and tensor.name in update.tensors:
                assert np.array_equal(adapter[tensor.name], update.tensors[tensor.name])


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(STARTED_ANEW)))
def test_one_device_gets_its_own_factors_back_exactly(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = plain(name)
    state, [update] = play(method, method.start(space, initial), space, [device("a")], trainer)

    adapter = method.global_adapter(state, space)

    assert update.tensors
    assert all(np.array_equal(adapter[n], values) for n, values in update.tensors.items())


@pytest.mark.parametrize("name", NAMES)
def test_devices_that_send_the_same_change_nothing_but_the_value(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = plain(name)
    state = method.start(space, initial)
    one, [update] = play(method, state, space, [device("a")], trainer)
    many = method.aggregate(
        state, space, [replace(update, device_id=f"d{i}", examples=3 + i) for i in range(5)]
    )

    expected = products(method.global_adapter(one, space), space)
    for module, product in products(method.global_adapter(many, space), space).items():
        np.testing.assert_allclose(product, expected[module], atol=1e-5)


EXACT = ("fedex-lora", "ffa-lora", "flexlora", "flora", "lora-a2", "rolora")
INEXACT = sorted(set(NAMES) - set(EXACT) - {"fedbf", "fedpeft-bias"})


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_reproduce_the_mean_of_the_products(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """Weighted by data, over rounds, with devices of mixed ranks where the method takes them."""
    method = plain(name)
    state = method.start(space, initial)
    for round_number in range(4):
        before = state
        state, updates = play(method, state, space, fleet(device), trainer, round_number)

        mean = products(method.global_adapter(state, space), space)

        total = sum(u.examples for u in updates)
        local = [products(local_adapter(method, before, space, u), space) for u in updates]
        for module, product in mean.items():
            wanted = sum(
                u.examples / total * own[module] for u, own in zip(updates, local, strict=True)
            )
            np.testing.assert_allclose(product, wanted, atol=1e-4)  # float32 factors of size 10


@pytest.mark.parametrize("name", INEXACT)
def test_means_of_factors_are_not_the_mean_of_the_products(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = build_method(name)
    cohort = [device(f"d{i}") for i in range(3)]
    start = method.start(space, initial)
    state, updates = play(method, start, space, cohort, trainer)

    mean = products(method.global_adapter(state, space), space)

    total = sum(u.examples for u in updates)
    local = [products(local_adapter(method, start, space, u), space) for u in updates]
    module = space.pairs()[-1][0].module
    wanted = sum(u.examples / total * own[module] for u, own in zip(updates, local, strict=True))
    assert np.abs(mean[module] - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("name", "largest"),
    [("fedex-lora", 1e-6), ("flexlora", 1e-6), ("flora", 1e-6), ("fedit", None)],
)
def test_exact_methods_have_no_aggregation_error_where_fedit_has_one(
    name: str,
    largest: float | None,
    space: AdapterSpace,
    initial: Tensors,
    device: Devices,
    trainer: Trainer,
) -> None:
    """``||model - mean of the devices' models|| / ||mean||`` over all modules, equal devices.

    FedIT's is that of the cross terms ``p_j p_k B_j A_k``; the branch of that name in FLoRA's own
    repository adds into a misspelt variable, so that only the first device would count.
    """
    method = plain(name)
    start = method.start(space, initial)
    cohort = [device(f"d{i}") for i in range(4)]
    state, updates = play(method, start, space, cohort, trainer)

    model = products(method.global_adapter(state, space), space)

    total = sum(u.examples for u in updates)
    local = [products(local_adapter(method, start, space, u), space) for u in updates]
    square = size = 0.0
    for module, product in model.items():
        mean = sum(u.examples / total * own[module] for u, own in zip(updates, local, strict=True))
        square += float(np.linalg.norm(product - mean) ** 2)
        size += float(np.linalg.norm(mean) ** 2)
    error = np.sqrt(square / size)
    assert error <= largest if largest is not None else error > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_was_away_computes_what_one_that_was_there_does(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = build_method(name)
    state = method.start(space, initial)
    for round_number in range(3):
        state, _ = play(method, state, space, fleet(device), trainer, round_number)
    rng = np.random.default_rng(0)
    [work] = method.assign(state, space, 3, [device("device-3", max_depth=4)], rng)

    there = method.broadcast(state, space, work)
    away = method.broadcast(state, space, replace(work, device_id="away"))

    known = [pair for pair in space.pairs() if pair[0].name in there]
    own, other = products(there, space, pairs=known), products(away, space, pairs=known)
    for module, product in own.items():
        np.testing.assert_allclose(product, other[module], atol=1e-4)  # float32 factors
    for tensor in space.tensors:
        if tensor.role in ("head", "bias", "norm"):
            assert np.array_equal(there[tensor.name], away[tensor.name])


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_devices_changes_nothing(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = build_method(name, options(name))
    state = method.start(space, initial)
    _, updates = play(method, state, space, fleet(device), trainer)

    forward = method.aggregate(state, space, updates)
    backward = method.aggregate(state, space, reversed(updates))
    again = method.aggregate(state, space, updates)

    assert pack_state(forward) == pack_state(again)
    assert forward.devices == backward.devices
    one, other = products(forward.tensors, space), products(backward.tensors, space)
    for tensor in space.tensors:
        if tensor.role in DELTA_ROLES:  # another pair may stand for the same change
            module = tensor.module.removesuffix(".base_delta")
            np.testing.assert_allclose(one[module], other[module], atol=1e-5)
            continue
        np.testing.assert_allclose(
            forward.tensors[tensor.name],
            backward.tensors[tensor.name],
            rtol=1e-6,  # float64 sums in another order, rounded to float32
            atol=1e-6,
        )


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_cohort_changes_no_assignment(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = build_method(name, options(name))
    state = method.start(space, initial)
    cohort = fleet(device)

    forward = method.assign(state, space, 0, cohort, np.random.default_rng(3))
    backward = method.assign(state, space, 0, cohort[::-1], np.random.default_rng(3))

    assert [a.device_id for a in backward] == [d.device_id for d in cohort[::-1]]
    assert forward == backward[::-1]


@pytest.mark.parametrize("name", NAMES)
def test_everything_fits_together_round_after_round(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = build_method(name, options(name))
    state = method.start(space, initial)
    for round_number in range(3):
        cohort = fleet(device)
        rng = np.random.default_rng([5, round_number])
        for assignment in method.assign(state, space, round_number, cohort, rng):
            received = method.broadcast(state, space, assignment)
            held = [t for t in space.tensors if t.layer < 0 or t.layer in assignment.kept_layers]
            assert set(received) == {t.name for t in held}
            assert set(assignment.trained_layers) <= set(assignment.kept_layers)
            for tensor in held:
                rank = assignment.ranks.get(tensor.module)
                if tensor.role in DELTA_ROLES:  # its rank is its own
                    rank = received[tensor.name].shape[tensor.shape.index("rank")]
                shape = tuple(rank if n == "rank" else n for n in tensor.shape)
                assert received[tensor.name].shape == shape
                assert received[tensor.name].dtype == np.float32
        state, _ = play(method, state, space, cohort, trainer, round_number)
        assert set(method.global_adapter(state, space)) == {t.name for t in space.tensors}


@pytest.mark.parametrize("name", NAMES)
def test_a_restarted_server_goes_on_bit_for_bit(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    inner = build_method(name, options(name))
    anew = name in STARTED_ANEW or name == "fedex-lora"
    method = HeadStart(inner if anew else ServerOptimizer(inner))
    straight = method.start(space, initial)
    restarted = straight
    for round_number in range(4):
        straight, _ = play(method, straight, space, fleet(device), trainer, round_number)
        restarted = unpack_state(pack_state(restarted))
        restarted, _ = play(method, restarted, space, fleet(device), trainer, round_number)

    assert pack_state(straight) == pack_state(restarted)


@pytest.mark.parametrize("name", NAMES)
def test_alpha_and_rank_changed_together_change_nothing(
    name: str,
    spaces: Callable[..., AdapterSpace],
    initials: Callable[..., Tensors],
    device: Devices,
    trainer: Trainer,
) -> None:
    """alpha = s r; the same trained pair at a larger rank is the pair padded with zeros."""
    small, large = spaces(name, max_rank=4), spaces(name, max_rank=8)
    method = build_method(name, {} if name == "legend" else options(name))
    narrow_start = initials(small, principal=name == "frlora")
    start = method.start(small, narrow_start)
    state, [update] = play(method, start, small, [device("a")], trainer)
    shapes = {n: v.shape for n, v in initials(large).items()}
    wide_initial = {n: grown(v, shapes[n]) for n, v in narrow_start.items()}
    wide_start = method.start(large, wide_initial)
    [wide] = method.assign(wide_start, large, 0, [device("a")], np.random.default_rng(0))
    padded = {n: grown(v, wide_start.tensors[n].shape) for n, v in update.tensors.items()}

    after = method.aggregate(wide_start, large, [replace(update, assignment=wide, tensors=padded)])

    assert wide.scale == update.assignment.scale
    narrow = products(method.global_adapter(state, small), small)
    for module, product in products(method.global_adapter(after, large), large).items():
        np.testing.assert_allclose(product, narrow[module], atol=1e-4)  # float32 factors


def grown(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(values, [(0, n - m) for n, m in zip(shape, values.shape, strict=True)])


@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_rank_class_is_no_better_than_the_best_of_that_rank(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = plain(name)
    state, _ = play(method, method.start(space, initial), space, [device("a")], trainer)
    full = products(method.global_adapter(state, space), space)

    cut = method.global_adapter(state, space, rank=2)

    for (a, _), (module, product) in zip(space.pairs(), products(cut, space).items(), strict=True):
        best = np.linalg.norm(np.linalg.svd(full[module], compute_uv=False)[2:])
        error = np.linalg.norm(full[module] - product)
        assert cut[a.name].shape[0] == 2
        assert error >= best * (1 - 1e-5)
        if name != "hetlora":  # which truncates, as the paper does
            assert error == pytest.approx(best, rel=1e-4)
