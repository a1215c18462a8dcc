# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest

from lorikit.server.methods import FACTS
from lorikit.server.methods.base import AdapterSpace
from lorikit.server.methods.base_delta import with_deltas
from lorikit.server.methods.costs import model_costs
from lorikit.server.methods.facts import Cost

HEAD = 3 * 5 + 3
PAIRS = 4 * ((5 + 9) + (9 + 5))


def test_costs_of_a_lora_model_by_hand(space: AdapterSpace) -> None:
    costs = model_costs(space)

    assert costs.keys() == FACTS.keys()
    full = Cost(up=4 * (6 * PAIRS + HEAD), down=4 * (6 * PAIRS + HEAD))
    half = Cost(up=4 * (3 * PAIRS + HEAD), down=full.down)  # 14 of 28 a layer, either factor
    for name in ("fedit", "hetlora", "flexlora", "fedra", "lora-fair"):
        assert costs[name].rounds == (full,)
    assert costs["rolora"].rounds == (half, half)
    assert costs["ffa-lora"].rounds == (half,)


def test_base_deltas_count_at_their_largest_rank(space: AdapterSpace) -> None:
    costs = model_costs(space)

    [flora], [frlora] = costs["flora"].rounds, costs["frlora"].rounds
    assert flora.up == frlora.up == 4 * (6 * PAIRS + HEAD)
    assert flora.down == frlora.down == 4 * ((6 + 5) * PAIRS + HEAD)  # of 9 x 5 matrices
    assert costs["flora"].lacks == ()  # a run that uses it compiles packages that have them
    assert model_costs(with_deltas(space))["flora"] == costs["flora"]
    assert costs["lora-a2"].rounds[0].down == 4 * ((6 + 1) * PAIRS + HEAD)


@pytest.mark.parametrize("name", ["fedbf", "fedpeft-bias"])
def test_what_a_model_lacks_is_named_in_place_of_numbers(
    name: str, spaces: Callable[..., AdapterSpace]
) -> None:
    lora, bias = model_costs(spaces("fedit")), model_costs(spaces(name))

    assert (lora[name].rounds, lora[name].lacks) == ((), ("bias",))
    assert bias[name].rounds == (
        Cost(up=4 * (4 * (9 + 5) + HEAD), down=4 * (2 * 4 * (9 + 5) + HEAD)),
    )
    assert bias["fedit"].lacks == ("lora_A", "lora_B")
