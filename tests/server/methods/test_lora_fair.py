# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods import build_method
from lorikit.server.methods.base import AdapterSpace, Contribution, Method, Participant
from lorikit.server.methods.lora_fair import LoRAFair, LoRAFairConfig

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
RNG = np.random.default_rng(0)
OPTIONS: list[dict[str, object]] = [
    {"penalty": 0.0},
    {"penalty": 0.01},
    {"solver": "cosine", "steps": 50},
]


def error(
    method: Method, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> float:
    """Distance of the model after a round of three devices from the mean of the products."""
    state = method.start(space, initial)
    work = method.assign(state, space, 0, [device(f"d{i}") for i in range(3)], RNG)
    updates = [trainer(method, state, space, w, examples=i + 1, seed=i) for i, w in enumerate(work)]
    adapter = method.aggregate(state, space, updates).tensors
    squares = 0.0
    for a, b in space.pairs():
        wanted = sum(
            u.examples / 6 * 2.0 * u.tensors[b.name].astype("f8") @ u.tensors[a.name]
            for u in updates
        )
        own = 2.0 * adapter[b.name].astype("f8") @ adapter[a.name]
        squares += float(np.sum((own - wanted) ** 2))
    return float(np.sqrt(squares))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_correction_comes_nearer_to_the_mean_product_than_fedit(
    options: dict[str, object],
    space: AdapterSpace,
    initial: Tensors,
    device: Devices,
    trainer: Trainer,
) -> None:
    fair, fedit = build_method("lora-fair", options), build_method("fedit")

    assert error(fair, space, initial, device, trainer) < error(
        fedit, space, initial, device, trainer
    )


def test_without_penalty_what_is_left_lies_outside_the_rows_of_the_mean_a(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """Rank 6 covers an input of 5 wholly: there the mean product is met exactly."""
    method = LoRAFair(LoRAFairConfig(penalty=0.0))
    state = method.start(space, initial)
    work = method.assign(state, space, 0, [device("a"), device("b")], RNG)
    one, other = (trainer(method, state, space, w, seed=i) for i, w in enumerate(work))

    adapter = method.aggregate(state, space, [one, other]).tensors

    for a, b in space.pairs():
        wanted = sum(u.tensors[b.name].astype("f8") @ u.tensors[a.name] / 2 for u in (one, other))
        left = wanted - adapter[b.name].astype("f8") @ adapter[a.name]
        np.testing.assert_allclose(left @ adapter[a.name].T, 0, atol=1e-4)
        if a.shape[1] == 5:
            np.testing.assert_allclose(left, 0, atol=1e-4)


def test_a_is_the_mean_and_only_b_is_corrected(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """Correcting A, or both, is measurably worse in the paper."""
    fair, fedit = build_method("lora-fair"), build_method("fedit")
    state = fedit.start(space, initial)
    work = fedit.assign(state, space, 0, [device("a"), device("b")], RNG)
    updates = [trainer(fedit, state, space, w, seed=i) for i, w in enumerate(work)]

    one, other = (m.aggregate(state, space, updates).tensors for m in (fair, fedit))

    different = {t.role for t in space.tensors if not np.array_equal(one[t.name], other[t.name])}
    assert different == {"lora_B"}


def test_the_scale_cancels(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    results = []
    for scale in (0.5, 2.0):
        method = LoRAFair(LoRAFairConfig(scale=scale))
        state = method.start(space, initial)
        work = method.assign(state, space, 0, [device("a"), device("b")], RNG)
        updates = [trainer(method, state, space, w, seed=i) for i, w in enumerate(work)]
        results.append(method.aggregate(state, space, updates).tensors)

    for tensor in space.tensors:
        np.testing.assert_allclose(
            results[0][tensor.name], results[1][tensor.name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "options",
    [{"penalty": -1.0}, {"solver": "adam"}, {"steps": 0}, {"learning_rate": 0.0}, {"scale": 0.0}],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        LoRAFairConfig(**options)  # type: ignore[arg-type]  # wrong on purpose
