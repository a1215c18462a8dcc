# SPDX-License-Identifier: Apache-2.0
"""The planner over a memory model whose sums can be done in the head."""

from __future__ import annotations

import pytest

from lorikit.proto.device import EngineInfo, Profile
from lorikit.server.methods.base import Assignment
from lorikit.server.planner import DoesNotFitError, Planner

MB = 1_000_000
BASE = {"fp32": 80 * MB, "fp16": 40 * MB, "int8": 20 * MB, "nf4": 10 * MB}


class Model:
    """Base, plus 1 MB a rank, 2 MB a trained layer, and 5 MB an example at 32 tokens."""

    layer_count = 4

    def base_bytes(self, precision):
        return BASE[precision]

    def flops_per_token(self, lowest_trained_layer, kept_layers):
        return 10**6 * (2 * len(kept_layers) - lowest_trained_layer)

    def predicted_peak_memory(
        self,
        *,
        precision,
        lowest_trained_layer,
        kept_layers,
        rank,
        micro_batch,
        length,
        baseline_bytes,
    ):
        trained = sum(layer >= lowest_trained_layer for layer in kept_layers)
        live = 5 * MB * micro_batch * length // 32
        return baseline_bytes + BASE[precision] + rank * MB + 2 * trained * MB + live


def planner(**changes):
    settings = {"batch_size": 32, "max_length": 32, "max_rank": 8, "safety": 1.0, **changes}
    return Planner(Model(), **settings)


def profile(limit, engine="onnx"):
    return Profile(
        memory_limit_bytes=limit * MB,
        memory_baseline_bytes=50 * MB,
        engines=(EngineInfo(name=engine, version="1"),),
    )


def assignment(rank=4, trained=(0, 1, 2, 3)):
    return Assignment(
        device_id="d", ranks={"m": rank}, trained_layers=trained, kept_layers=(0, 1, 2, 3)
    )


@pytest.mark.parametrize(
    ("limit", "precision"), [(110, "nf4"), (260, "int8"), (600, "fp16"), (2000, "fp32")]
)
def test_base_takes_at_most_its_share_of_the_budget(limit: int, precision: str) -> None:
    assert planner().choose(profile(limit), assignment()).precision == precision


def test_micro_batch_is_the_largest_that_fits() -> None:
    # 50 app + 10 base + 4 rank + 8 layers = 72 MB; 5 MB an example leave room for 4 in 95 MB.
    choice = planner().choose(profile(95), assignment())

    assert choice.micro_batch == 4
    assert choice.predicted_peak_memory_bytes == (72 + 4 * 5) * MB


def test_micro_batch_stops_where_a_larger_one_is_no_faster() -> None:
    assert planner().choose(profile(100_000), assignment()).micro_batch == 256 // 32


def test_less_depth_leaves_room_for_a_larger_micro_batch() -> None:
    deep = planner().choose(profile(79), assignment())
    shallow = planner().choose(profile(79), assignment(trained=(3,)))

    assert (deep.micro_batch, shallow.micro_batch) == (1, 2)


def test_limits_of_a_device_follow_from_its_memory() -> None:
    # At micro-batch 1: 50 + 10 + 5 = 65 MB, plus rank 1 and 2 MB a layer: 71 MB hold two layers.
    device = planner().participant("d", profile(71), {})

    assert (device.max_depth, device.max_rank) == (2, 2)


def test_refusal_names_the_limit_and_the_smallest_remedy() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planner().choose(profile(76), assignment())

    assert "needs 73 MiB; the device allows 72 MiB" in caught.value.reason
    assert caught.value.remedy == "Set max_length to 16, or allow the app 73 MiB."


def test_the_runtime_is_that_of_the_preferred_engine() -> None:
    choice = planner().choose(profile(500, engine="onnx-training"), assignment())

    assert choice.runtime == "onnx-training"
