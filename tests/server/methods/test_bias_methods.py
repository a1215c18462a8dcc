# SPDX-License-Identifier: Apache-2.0
"""FedPEFT-Bias and FedBF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods import build_method
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant
from lorikit.server.methods.fedpeft_bias import FedPEFTBias, FedPEFTBiasConfig

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", ["fedbf", "fedpeft-bias"])
def test_biases_and_head_are_data_weighted_means_and_nothing_else_moves(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = build_method(name)
    state = method.start(space, initial)
    work = method.assign(state, space, 0, [device("a"), device("b")], RNG)
    one, other = (
        trainer(method, state, space, w, examples=n, seed=n)
        for w, n in zip(work, (30, 10), strict=True)
    )

    after = method.aggregate(state, space, [one, other])

    for tensor in space.tensors:
        if tensor.role == "norm":
            assert np.array_equal(after.tensors[tensor.name], initial[tensor.name])
            continue
        wanted = 0.75 * one.tensors[tensor.name] + 0.25 * other.tensors[tensor.name]
        np.testing.assert_allclose(after.tensors[tensor.name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fedpeft-bias"])
@pytest.mark.parametrize(
    ("tensors", "there", "trains"),
    [
        ("bias", ("bias", "norm"), ("bias", "head")),
        ("norm", ("bias", "norm"), ("norm", "head")),
        ("both", ("bias", "norm"), ("bias", "norm", "head")),
        ("bias", ("norm",), ("norm", "head")),  # LLaMA-like: no biases
        ("norm", ("bias",), ("bias", "head")),
    ],
)
def test_a_model_without_biases_trains_its_gains(
    tensors: str,
    there: tuple[str, ...],
    trains: tuple[str, ...],
    space: AdapterSpace,
    initial: Tensors,
    device: Devices,
) -> None:
    method = FedPEFTBias(FedPEFTBiasConfig(tensors=tensors))  # type: ignore[arg-type]  # parametrized
    model = replace(space, tensors=space.named(*there, "head"))

    [work] = method.assign(method.start(model, initial), model, 0, [device("a")], RNG)

    assert work.train_roles == trains


def test_a_lora_package_is_refused_with_a_way_out(space: AdapterSpace, initial: Tensors) -> None:
    with pytest.raises(ValueError, match=r"roles bias or norm, .* compile the model for bias"):
        FedPEFTBias().start(space, initial)


@pytest.mark.parametrize("name", ["fedbf"])
def test_a_common_smaller_depth_trains_the_last_layers(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = build_method(name, {"depth": 1})
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], RNG)

    update = trainer(method, state, space, work)

    assert {t.layer for t in space.tensors if t.name in update.tensors} == {3, -1}


def test_another_choice_of_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="tensors must be 'bias', 'norm' or 'both', got 'all'"):
        FedPEFTBiasConfig(tensors="all")  # type: ignore[arg-type]  # wrong on purpose
