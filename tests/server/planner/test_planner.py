# SPDX-License-Identifier: Apache-2.0
"""The planner over a memory model whose sums can be done in the head."""

from __future__ import annotations

import pytest

from lorikit.proto.device import EngineInfo, Profile
from lorikit.server.methods.base import Assignment
from lorikit.server.planner import DoesNotFitError, MemoryCorrections, Planner
from lorikit.server.planner.corrections import ENOUGH_REPORTS
from lorikit.server.planner.speed import Operations

MB = 1_000_000
BASE = {"fp32": 80 * MB, "fp16": 40 * MB, "int8": 20 * MB, "int4": 12 * MB, "nf4": 10 * MB}


class Model:
    """Base, plus 1 MB a rank, 2 MB a trained layer, and 5 MB an example at 32 tokens.

    With ``kept_mb``, an example at 32 tokens keeps that much more for each trained layer that is
    not recomputed; with ``layer_mb``, each layer of the sub-model takes that much.
    """

    layer_count = 4

    def __init__(self, kept_mb=0, layer_mb=0):
        self.kept_mb, self.layer_mb = kept_mb, layer_mb
        self.asked = 0

    def base_bytes(self, precision):
        return BASE[precision]

    def tokens(self, length):
        return length

    def operations(self, layers, step):
        count = sum(layer >= 0 for layer in layers)
        rows = step.micro_batch * step.length
        return Operations(weights=10**6 * count, products=2 * 10**6 * count * rows)

    def predicted_peak_memory(self, step, *, baseline_bytes):
        self.asked += 1
        kept = self.kept_mb * len(set(step.trained_layers) - set(step.recomputed_layers))
        live = (5 + kept) * MB * step.micro_batch * step.length // 32
        base = BASE[step.precision] * (2 if step.kernels == "fast" else 1)
        layers = (2 * len(step.trained_layers) + self.layer_mb * len(step.kept_layers)) * MB
        return baseline_bytes + base + step.rank * MB + layers + live


def planner(model=None, **changes):
    settings = {"batch_size": 32, "max_length": 32, "max_rank": 8, "safety": 1.0, **changes}
    return Planner(model or Model(), **settings)


def profile(limit, engine="onnx"):
    return Profile(
        device_class="a class",
        memory_limit_bytes=limit * MB,
        memory_baseline_bytes=50 * MB,
        engines=(EngineInfo(name=engine, version="1"),),
    )


def assignment(rank=4, trained=(0, 1, 2, 3)):
    return Assignment(
        device_id="d", ranks={"m": rank}, trained_layers=trained, kept_layers=(0, 1, 2, 3)
    )


@pytest.mark.parametrize(
    ("limit", "precision"), [(126, "nf4"), (260, "int8"), (600, "fp16"), (2000, "fp32")]
)
def test_base_takes_at_most_its_share_of_the_budget(limit: int, precision: str) -> None:
    assert planner().choose(profile(limit), assignment()).precision == precision


def test_class_with_precisions_of_its_own_gets_none_but_these() -> None:
    own = planner(class_precisions={"a class": ["nf4"]})
    others = planner(class_precisions={"another class": ["nf4"]})

    assert own.choose(profile(2000), assignment()).precision == "nf4"
    assert others.choose(profile(2000), assignment()).precision == "fp32"
    with pytest.raises(DoesNotFitError, match="fp16"):
        planner(class_precisions={"a class": ["fp16"]}).choose(profile(95), assignment())


def test_micro_batch_is_the_largest_that_fits() -> None:
    # 50 app + 10 base + 4 rank + 8 layers = 72 MB; 5 MB an example leave room for 4 in 95 MB.
    choice = planner(precisions=["nf4"]).choose(profile(95), assignment())

    assert choice.micro_batch == 4
    assert choice.predicted_peak_memory_bytes == (72 + 4 * 5) * MB


def test_micro_batch_stops_where_a_larger_one_is_no_faster() -> None:
    assert planner().choose(profile(100_000), assignment()).micro_batch == 256 // 32


def test_less_depth_leaves_room_for_a_larger_micro_batch() -> None:
    deep = planner(precisions=["nf4"]).choose(profile(79), assignment())
    shallow = planner(precisions=["nf4"]).choose(profile(79), assignment(trained=(3,)))

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


def test_refusal_names_a_precision_that_the_run_does_not_allow() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planner(precisions=["fp32", "fp16"]).choose(profile(88), assignment())

    # 50 app + 40 base + 4 rank + 8 layers + 5 = 107 MB; of the others int8, at 87 MB, fits best.
    assert caught.value.remedy == "Allow the precision int8, or allow the app 102 MiB."


def test_refused_device_is_told_what_the_smallest_sub_model_needs() -> None:
    model = Model(layer_mb=10)

    with pytest.raises(DoesNotFitError) as caught:
        planner(model).participant("d", profile(60), {})

    # 50 app + 10 base + 1 rank + 2 + 5 = 68 MB, and 10 for the one layer that is kept.
    assert "rank 1, 1 layer, trained from layer 0" in caught.value.reason
    assert "needs 74 MiB" in caught.value.reason


def test_the_runtime_is_that_of_the_preferred_engine() -> None:
    choice = planner().choose(profile(500, engine="onnx-training"), assignment())

    assert choice.runtime == "onnx-training"


def test_where_no_base_keeps_to_its_share_the_fastest_that_fits_wins() -> None:
    # 50 app + 4 rank + 8 layers + 5 an example = 67 MB: 40 of fp16 fit in 110, 80 of fp32 do not.
    choice = planner(batch_size=1).choose(profile(110), assignment())

    assert choice.precision == "fp16"
    assert "fp16 base (fp32 would need 37 MB more)" in choice.bound


def test_only_as_many_layers_are_recomputed_as_the_limit_asks_for() -> None:
    # One example of 32 tokens: 50 + 10 + 4 + 8 + 5 = 77 MB, and 6 MB for each layer that is kept.
    tight = planner(Model(kept_mb=6), precisions=["nf4"], batch_size=1)

    choices = [tight.choose(profile(limit), assignment()) for limit in (77, 83, 90, 101)]

    assert [c.recomputed_layers for c in choices] == [(0, 1, 2, 3), (0, 1, 2), (0, 1), ()]
    assert [c.predicted_peak_memory_bytes // MB for c in choices] == [77, 83, 89, 101]
    seconds = [c.seconds_per_step for c in choices]
    assert seconds == sorted(seconds, reverse=True)
    assert choices[2].bound == "recomputing 2 of 4 layers (1 would need 5 MB more)"
    assert choices[3].bound == ""


def test_only_trained_layers_are_recomputed() -> None:
    tight = planner(Model(kept_mb=6), precisions=["nf4"], batch_size=1)

    choice = tight.choose(profile(50 + 10 + 4 + 4 + 5 + 6), assignment(trained=(2, 3)))

    assert choice.recomputed_layers == (2,)


def test_smaller_micro_batch_is_preferred_to_recomputation_where_it_costs_nothing() -> None:
    # fp32 weights are read as they lie, so splitting a batch costs less than a second forward pass.
    choice = planner(Model(kept_mb=6), precisions=["fp32"]).choose(
        profile(50 + 80 + 4 + 8 + 2 * 29), assignment()
    )

    assert (choice.micro_batch, choice.recomputed_layers) == (2, ())
    assert choice.bound == "micro-batch 2 (4 would need 58 MB more)"


def test_fast_kernels_are_used_where_their_second_copy_fits() -> None:
    lean, fast = (
        planner(precisions=["int4"], batch_size=1).choose(profile(limit), assignment())
        for limit in (79, 91)
    )

    # 50 + 12 + 4 + 8 + 5 = 79 MB, and 12 more for the second copy of the base.
    assert (lean.kernels, fast.kernels) == ("lean", "fast")
    assert fast.seconds_per_step < lean.seconds_per_step


def test_depth_counts_the_recomputation_that_makes_it_fit() -> None:
    device = planner(Model(kept_mb=6)).participant("d", profile(50 + 10 + 1 + 8 + 5), {})

    assert device.max_depth == 4


def test_what_a_class_reported_scales_its_plans() -> None:
    learnt = MemoryCorrections()
    for _ in range(20):
        learnt.observe("a class", predicted_bytes=100 * MB, measured_bytes=120 * MB)

    with_it = planner(precisions=["nf4"], batch_size=1, corrections=learnt)

    # 77 MB by the model, 1.2 times that by experience.
    assert with_it.choose(profile(100), assignment()).predicted_peak_memory_bytes == pytest.approx(
        1.2 * 77 * MB, rel=0.01
    )
    with pytest.raises(DoesNotFitError):
        with_it.choose(profile(90), assignment())


def test_a_class_that_reported_may_fill_more_of_its_limit() -> None:
    learnt = MemoryCorrections()
    for _ in range(ENOUGH_REPORTS):
        learnt.observe("a class", predicted_bytes=MB, measured_bytes=MB)
    settings = {"precisions": ["nf4"], "batch_size": 1, "safety": 0.95}

    # 50 app + 10 base + 4 rank + 8 layers + 5 an example = 77 MB, 97.5 % of 79 MB.
    planner(corrections=learnt, **settings).choose(profile(79), assignment())
    with pytest.raises(DoesNotFitError, match="allow the app 77 MiB"):
        planner(**settings).choose(profile(79), assignment())


def test_a_deep_model_is_asked_for_few_plans() -> None:
    model = Model(kept_mb=6)
    model.layer_count = 64
    layers = tuple(range(64))
    work = Assignment(device_id="d", ranks={"m": 4}, trained_layers=layers, kept_layers=layers)

    planner(model, precisions=["nf4"], batch_size=1).choose(profile(400), work)

    # One plan with all layers recomputed, and a search by halves: not 64.
    assert model.asked < 12
