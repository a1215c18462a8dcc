# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods import FACTS, METHODS, build_method
from lorikit.server.methods.base import AdapterSpace, Contribution, Method, Participant, State
from lorikit.server.methods.head_start import HeadStart
from lorikit.server.methods.server_optimizer import ServerOptimizer, ServerOptimizerConfig

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
NEW_EACH_ROUND = ("fedex-lora", "flexlora", "flora", "frlora")


def played(
    method: Method,
    state: State,
    space: AdapterSpace,
    cohort: list[Participant],
    trainer: Trainer,
    seed: int,
) -> State:
    work = method.assign(state, space, seed, cohort, np.random.default_rng(seed))
    updates = [trainer(method, state, space, a, seed=10 * seed + i) for i, a in enumerate(work)]
    return method.aggregate(state, space, updates)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(NEW_EACH_ROUND)))
def test_momentum_zero_and_rate_one_is_the_method_itself(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    inner = build_method(name)
    method = ServerOptimizer(inner, ServerOptimizerConfig(learning_rate=1.0, beta1=0.0))
    cohort = [device("a", max_layers=2), device("b", max_layers=3, max_depth=2)]
    plain = wrapped = inner.start(space, initial)
    for seed in range(3):
        plain = played(inner, plain, space, cohort, trainer, seed)
        wrapped = played(method, wrapped, space, cohort, trainer, seed)

    got, wanted = method.global_adapter(wrapped, space), inner.global_adapter(plain, space)
    for name_ in wanted:
        np.testing.assert_allclose(got[name_], wanted[name_], atol=1e-5)


def test_momentum_carries_on_by_hand(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = ServerOptimizer(
        build_method("fedit"), ServerOptimizerConfig(learning_rate=0.5, beta1=0.5)
    )
    state = method.start(space, initial)
    name, momentum = "classifier.bias", np.zeros(3)
    for seed in range(3):
        [work] = method.assign(state, space, seed, [device("a")], np.random.default_rng(0))
        update = trainer(method, state, space, work, seed=seed)
        momentum = 0.5 * momentum + (update.tensors[name] - state.tensors[name])
        wanted = state.tensors[name] + 0.5 * momentum
        state = method.aggregate(state, space, [update])
        np.testing.assert_allclose(state.tensors[name], wanted, rtol=1e-5, atol=1e-6)


def test_adam_starts_its_squares_at_tau(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    config = ServerOptimizerConfig(name="adam", learning_rate=0.1, beta1=0.9, beta2=0.99, tau=0.01)
    method = ServerOptimizer(build_method("fedit"), config)
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], np.random.default_rng(0))
    update = trainer(method, state, space, work)

    after = method.aggregate(state, space, [update])

    for name, values in update.tensors.items():
        change = values - state.tensors[name]
        v = 0.99 * 0.01**2 + 0.01 * change**2
        wanted = state.tensors[name] + 0.1 * (0.1 * change) / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(after.tensors[name], wanted, rtol=1e-5, atol=1e-6)


def test_a_layer_nobody_held_keeps_value_and_momentum(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = ServerOptimizer(build_method("legend"))
    state = played(method, method.start(space, initial), space, [device("a")], trainer, 0)
    shallow = [device("b", max_depth=1)]

    after = played(method, state, space, shallow, trainer, 1)

    moved = {
        t.layer for t in space.tensors
        if not np.array_equal(after.tensors[t.name], state.tensors[t.name])
    }  # fmt: skip
    assert moved == {3, -1}
    kept = [n for n in state.tensors if n.startswith("server_optimizer.") and ".layer.0." in n]
    assert kept
    assert all(np.array_equal(after.tensors[n], state.tensors[n]) for n in kept)


def test_roles_left_out_take_the_aggregate(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    config = ServerOptimizerConfig(learning_rate=0.5, roles=("lora_A", "lora_B"))
    method = ServerOptimizer(build_method("fedit"), config)
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], np.random.default_rng(0))
    update = trainer(method, state, space, work)

    after = method.aggregate(state, space, [update])

    assert np.array_equal(after.tensors["classifier.bias"], update.tensors["classifier.bias"])
    a = space.pairs()[0][0].name
    assert not np.array_equal(after.tensors[a], update.tensors[a])


def test_every_role_that_a_method_trains_gets_momentum() -> None:
    roles = set(ServerOptimizerConfig().roles)

    assert all(set(sent) <= roles for facts in FACTS.values() for sent in facts.sent_roles)


@pytest.mark.parametrize("name", NEW_EACH_ROUND)
def test_factors_that_are_new_each_round_get_no_momentum(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} makes new .* use fedit, hetlora, legend"):
        ServerOptimizer(build_method(name))


def test_what_it_cannot_wrap_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"HeadStart\(ServerOptimizer\(method\)\)"):
        ServerOptimizer(HeadStart(build_method("fedit")))


@pytest.mark.parametrize(
    "options",
    [{"name": "sgd"}, {"learning_rate": 0.0}, {"tau": -1.0}, {"beta1": 1.0}, {"beta2": -0.5}],
)
def test_bad_options_are_refused_with_their_value(options: dict[str, object]) -> None:
    [value] = options.values()
    with pytest.raises(ValueError, match=str(value)):
        ServerOptimizerConfig(**options)  # type: ignore[arg-type]  # wrong on purpose
