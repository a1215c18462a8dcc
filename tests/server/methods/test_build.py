# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorikit.proto.tensors import Tensors
from lorikit.server.methods import CONFIGS, METHODS, build_method
from lorikit.server.methods.base import AdapterSpace, Contribution, Method, Participant
from lorikit.server.methods.fedit import FedIT
from lorikit.server.methods.hetlora import HetLoRA
from lorikit.server.methods.legend import Legend


def test_every_method_is_built_by_its_own_name() -> None:
    assert METHODS.keys() == CONFIGS.keys()
    for name, kind in METHODS.items():
        method = build_method(name)
        assert type(method) is kind
        assert method.name == name


def test_run_settings_reach_the_methods_that_have_them() -> None:
    hetlora = build_method("hetlora", {"gamma": 1}, scale=0.5, min_rank=4, local_steps=7)
    legend = build_method("legend", {"local_steps": 3}, scale=0.5, min_rank=4, local_steps=7)

    assert isinstance(hetlora, HetLoRA)
    assert (hetlora.config.gamma, hetlora.config.scale, hetlora.config.min_rank) == (1.0, 0.5, 4)
    assert isinstance(legend, Legend)
    assert (legend.config.local_steps, legend.config.scale) == (3, 0.5)  # options win


def test_defaults_are_the_configurations() -> None:
    method = build_method("fedit")

    assert isinstance(method, FedIT)
    assert method.config == FedIT().config


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no method 'fedavg'; there are: fedbf, fedex-lora, fedit"):
        build_method("fedavg")
    with pytest.raises(
        ValueError, match=r"hetlora has no option gama; it has: budget_exponent, gamma,"
    ):
        build_method("hetlora", {"gama": 0.9})


def test_an_option_of_other_methods_is_answered_with_those() -> None:
    with pytest.raises(
        ValueError, match=r"fedit has no option min_rank; .* have it: flexlora, flora, hetlora"
    ):
        build_method("fedit", {"min_rank": 2})
    with pytest.raises(ValueError, match=r"no option capacity; .*; methods that have it: fedra$"):
        build_method("hetlora", {"capacity": "budget"})


@pytest.mark.parametrize("value", ["0.9", None, True, [0.9]])
def test_options_of_the_wrong_type_are_named(value: object) -> None:
    with pytest.raises(ValueError, match="option gamma of hetlora must be a float"):
        build_method("hetlora", {"gamma": value})


def test_bad_values_name_the_method() -> None:
    with pytest.raises(ValueError, match=r"options of hetlora: gamma must lie in \(0, 1\], got 2"):
        build_method("hetlora", {"gamma": 2.0})


def test_every_option_is_plain_text_configuration() -> None:
    for config in CONFIGS.values():
        for field in dataclasses.fields(config):
            assert type(field.default) in (int, float, str, bool), field.name


def test_the_method_in_the_documentation_does_what_it_says(
    space: AdapterSpace,
    initial: Tensors,
    device: Callable[..., Participant],
    trainer: Callable[..., Contribution],
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
    names: dict[str, type] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    method: Method = names["Halfway"]()
    state = method.start(space, initial)
    [work] = method.assign(state, space, 0, [device("a")], np.random.default_rng(0))
    update = trainer(method, state, space, work)

    after = method.aggregate(state, space, [update])

    for name, values in update.tensors.items():
        np.testing.assert_allclose(after.tensors[name], (initial[name] + values) / 2, atol=1e-6)
