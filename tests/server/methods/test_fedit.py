# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant
from lorikit.server.methods.fedit import FedIT, FedITConfig

Devices = Callable[..., Participant]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("weighting", "first_share"), [("data", 0.75), ("uniform", 0.5)])
def test_factors_and_head_are_weighted_means(
    weighting: str,
    first_share: float,
    space: AdapterSpace,
    initial: Tensors,
    device: Devices,
    trainer: Callable[..., Contribution],
) -> None:
    method = FedIT(FedITConfig(weighting=weighting))  # type: ignore[arg-type]  # parametrized
    state = method.start(space, initial)
    first, second = (
        trainer(method, state, space, a, examples=n, seed=n)
        for a, n in zip(
            method.assign(state, space, 0, [device("a"), device("b")], RNG), (30, 10), strict=True
        )
    )

    after = method.aggregate(state, space, [first, second])

    for tensor in space.tensors:
        one, other = first.tensors[tensor.name], second.tensors[tensor.name]
        wanted = first_share * one + (1 - first_share) * other
        np.testing.assert_allclose(after.tensors[tensor.name], wanted, rtol=1e-5, atol=1e-6)


def test_every_device_gets_the_same_rank_and_depth(
    space: AdapterSpace, initial: Tensors, device: Devices
) -> None:
    method = FedIT(FedITConfig(rank=3, depth=2))
    state = method.start(space, initial)

    work = method.assign(state, space, 0, [device("a"), device("b", max_rank=1)], RNG)

    assert {a.trained_layers for a in work} == {(2, 3)}
    assert {a.kept_layers for a in work} == {(0, 1, 2, 3)}
    assert {rank for a in work for rank in a.ranks.values()} == {3}
    assert all(state.tensors[a.name].shape[0] == 3 for a, _ in space.pairs())


def test_what_the_model_does_not_have_is_refused(space: AdapterSpace, initial: Tensors) -> None:
    with pytest.raises(ValueError, match="rank 7 is above the run's largest rank 6"):
        FedIT(FedITConfig(rank=7)).start(space, initial)
    with pytest.raises(ValueError, match="depth 5 is above the 4 layers"):
        FedIT(FedITConfig(depth=5)).start(space, initial)


@pytest.mark.parametrize("options", [{"rank": -1}, {"depth": -2}, {"weighting": "norm"}])
def test_bad_options_are_refused_with_their_value(options: dict[str, object]) -> None:
    [value] = options.values()
    with pytest.raises(ValueError, match=str(value)):
        FedITConfig(**options)  # type: ignore[arg-type]  # wrong on purpose
