# SPDX-License-Identifier: Apache-2.0
"""Devices with different bases: what corrections give, what updates count as, what it is good for.

The federations are those of a.5's acceptance list: a small network, eight devices, four precisions.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from tests.server.methods.mixed_bases import (
    INNER,
    MODULES,
    RANK,
    SCALE,
    WIDTH,
    MixedFederation,
    MlpBases,
    make_initial,
    make_space,
)

from lorikit.server.methods.base import Assignment, Contribution
from lorikit.server.methods.base_correction import (
    BaseCorrection,
    CorrectionConfig,
    CorrectionName,
    UnknownBaseError,
)
from lorikit.server.methods.corrected import Corrected, drift_of
from lorikit.server.methods.corrections import CORRECTIONS, Compensators, build_correction
from lorikit.server.methods.fedit import FedIT, FedITConfig
from lorikit.server.methods.head_start import HeadStart
from lorikit.server.methods.state import pack_state, unpack_state

MIXED = ("fp16", "int8", "int4", "nf4") * 2
SAME = ("int8",) * 8
SEEDS = (0, 1, 2)
ROUNDS = 8


def correction(name: CorrectionName, seed: int = 0, **options: object) -> BaseCorrection:
    config = CorrectionConfig(name=name, **options)  # type: ignore[arg-type]  # any field
    return build_correction(MlpBases(seed=seed), config)


def federation(
    name: CorrectionName, precisions: tuple[str, ...], seed: int, **options: object
) -> MixedFederation:
    method = Corrected(FedIT(FedITConfig(scale=SCALE)), correction(name, seed, **options))
    return MixedFederation(MlpBases(seed=seed), method, precisions, seed=seed)


@functools.cache
def losses(name: CorrectionName, precisions: tuple[str, ...]) -> np.ndarray:
    """Loss after the last round, by seed."""
    out = []
    for seed in SEEDS:
        run = federation(name, precisions, seed)
        for number in range(ROUNDS):
            run.round(number)
        out.append(run.loss())
    return np.array(out)


def work(precision: str, device: str = "a") -> Assignment:
    return Assignment(
        device_id=device,
        ranks=dict.fromkeys(MODULES, RANK),
        trained_layers=(0,),
        kept_layers=(0,),
        scale=SCALE,
        precision=precision,
    )


def update(precision: str, seed: int, device: str = "a") -> Contribution:
    rng = np.random.default_rng(seed)
    tensors = {
        name: (values + 0.1 * rng.normal(size=values.shape)).astype(np.float32)
        for name, values in make_initial().items()
        if ".lora_" in name
    }
    return Contribution(
        device_id=device,
        assignment=work(precision, device),
        tensors=tensors,
        scalars={},
        examples=10,
    )


def product(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    return SCALE * b.astype(np.float64) @ a


def test_plain_averaging_over_bases_does_worse_than_with_compensators() -> None:
    assert (losses("none", MIXED) > 1.15 * losses("compensator", MIXED)).all()


def test_with_compensators_mixed_bases_do_as_well_as_eight_bits_for_all() -> None:
    same, mixed = losses("none", SAME), losses("compensator", MIXED)

    assert abs(mixed.mean() - same.mean()) < same.std(ddof=1)


def test_effective_weights_do_better_than_plain_averaging() -> None:
    assert losses("effective-weight", MIXED).mean() < losses("none", MIXED).mean()


def test_function_space_does_better_than_plain_averaging() -> None:
    assert (losses("function-space", MIXED) < losses("none", MIXED)).all()


def test_a_run_is_the_same_bit_for_bit_when_done_again() -> None:
    states = []
    for _ in range(2):
        run = federation("compensator", MIXED[:4], 0)
        run.steps = 3
        for number in range(2):
            run.round(number)
        states.append(pack_state(run.state))

    assert states[0] == states[1]


def test_compensators_leave_what_devices_send_as_it_is() -> None:
    sent = update("int4", 1)

    assert correction("compensator").counted(make_space(), make_initial(), sent) is sent


def test_compensators_are_the_same_in_every_round_and_for_every_device() -> None:
    run = federation("compensator", ("int4", "int4", "nf4"), 0)
    run.steps = 1
    before = [run._given(device) for device in range(3)]
    run.round(0)
    after = [run._given(device) for device in range(3)]

    for name in (f"{module}.base_delta_{part}" for module in MODULES for part in "AB"):
        np.testing.assert_array_equal(before[0][name], after[0][name])
        np.testing.assert_array_equal(before[0][name], before[1][name])
        assert not np.array_equal(before[0][name], before[2][name])


def test_an_exact_base_gets_a_compensator_that_does_nothing() -> None:
    adapter = update("fp32", 0).tensors

    given = correction("compensator").given(make_space(), adapter, work("fp32"), {})

    assert given["mlp.up.base_delta_A"].shape == (1, WIDTH)
    assert not given["mlp.up.base_delta_B"].any()


def test_a_compensator_joins_what_the_method_changed_of_the_base() -> None:
    rng = np.random.default_rng(0)
    adapter = make_initial()
    adapter["mlp.up.base_delta_A"] = rng.normal(size=(3, WIDTH)).astype(np.float32)
    adapter["mlp.up.base_delta_B"] = rng.normal(size=(INNER, 3)).astype(np.float32)
    compensators = correction("compensator", rank=5)
    assert isinstance(compensators, Compensators)

    given = compensators.given(make_space(), adapter, work("nf4"), {})

    a, b = compensators.factors("nf4", "mlp.up")
    change = adapter["mlp.up.base_delta_B"] @ adapter["mlp.up.base_delta_A"]
    together = given["mlp.up.base_delta_B"] @ given["mlp.up.base_delta_A"]
    assert given["mlp.up.base_delta_A"].shape == (3 + 5, WIDTH)
    np.testing.assert_allclose(together, change + b @ a, atol=1e-5)


def test_a_base_repaired_within_the_pair_counts_as_none_was() -> None:
    # The update's B holds -P E / s beside the task; with kappa = 1 only the task counts.
    fixed = correction("effective-weight", share=1.0)
    sent = update("int4", 3)
    back = fixed.given(make_space(), sent.tensors, work("int4"), {})

    counted = fixed.counted(make_space(), make_initial(), replace(sent, tensors=back))

    for module in MODULES:
        np.testing.assert_allclose(
            product(counted.tensors, module), product(sent.tensors, module), atol=0.03
        )


def test_function_space_takes_back_exactly_what_it_gave() -> None:
    matched, adapter = correction("function-space"), update("fp32", 3).tensors
    given = matched.given(make_space(), adapter, work("nf4"), {})
    assert not np.allclose(given["mlp.up.lora_B.weight"], adapter["mlp.up.lora_B.weight"])
    sent = replace(update("nf4", 0), tensors=given)

    counted = matched.counted(make_space(), adapter, sent)

    for name, values in adapter.items():
        np.testing.assert_allclose(counted.tensors[name], values, atol=1e-5)


def test_a_repair_in_function_space_brings_the_outputs_nearer() -> None:
    matched, adapter = correction("function-space"), update("fp32", 3).tensors
    bases, root = matched.bases, matched.bases.input_root("mlp.up")
    assert root is not None

    given = matched.given(make_space(), adapter, work("int4"), {})

    error = bases.error("int4", "mlp.up")
    moved = product(given, "mlp.up") - product(adapter, "mlp.up")
    assert np.linalg.norm((error + moved) @ root) < 0.95 * np.linalg.norm(error @ root)


def test_devices_with_coarse_bases_count_less() -> None:
    weighed = correction("precision-weight", floor=0.05)

    examples = {
        precision: weighed.counted(make_space(), make_initial(), update(precision, 0)).examples
        for precision in ("fp32", "int8", "int4")
    }

    error = weighed.relative_error("int4", MODULES)
    assert examples["fp32"] == 10 * 1024
    assert examples["fp32"] > examples["int8"] > examples["int4"]
    expected = 10 * 1024 * 0.05**2 / (0.05**2 + error**2)
    assert examples["int4"] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_an_update_of_an_unknown_base_is_refused(name: CorrectionName) -> None:
    method = Corrected(FedIT(FedITConfig(scale=SCALE)), correction(name))
    state = method.start(make_space(), make_initial())

    with pytest.raises(UnknownBaseError, match="no base of precision 'int2'"):
        method.aggregate(state, make_space(), [update("int2", 0)])
    with pytest.raises(UnknownBaseError, match="hand out the work anew"):
        method.broadcast(state, make_space(), work(""))


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_one_exact_base_makes_every_correction_plain_averaging(name: CorrectionName) -> None:
    plain = FedIT(FedITConfig(scale=SCALE))
    method = Corrected(plain, correction(name))
    updates = [update("fp32", seed, f"device-{seed}") for seed in range(3)]
    state = method.start(make_space(), make_initial())

    after = method.aggregate(state, make_space(), updates)

    own = method._own(make_space())
    expected = plain.aggregate(plain.start(own, make_initial()), own, updates)
    for tensor in own.tensors:
        np.testing.assert_allclose(
            after.tensors[tensor.name], expected.tensors[tensor.name], atol=1e-6
        )


def test_drift_says_what_a_compensator_leaves_of_each_base() -> None:
    run = federation("compensator", MIXED[:4], 0)
    run.round(0)

    rows = {row["precision"]: row for row in drift_of(run.state)}

    assert set(rows) == {"fp16", "int8", "int4", "nf4"}
    assert [rows[p]["weight"] for p in rows] == [0.25] * 4
    assert rows["int4"]["base_error"] > 10 * rows["int8"]["base_error"]
    for row in rows.values():
        assert row["base_error_after"] < 0.6 * row["base_error"]
        assert row["repair_after"] <= row["base_error"]
        assert row["pull_after"] == row["pull"]


def test_drift_of_one_class_pulls_nowhere() -> None:
    method = Corrected(FedIT(FedITConfig(scale=SCALE)), correction("none"))
    state = method.start(make_space(), make_initial())

    after = method.aggregate(state, make_space(), [update("nf4", 0), update("nf4", 1, "b")])

    [row] = drift_of(after)
    assert row["devices"] == 2
    assert row["pull"] == pytest.approx(0, abs=1e-12)


def test_drift_measures_the_distance_of_a_class_from_the_mean() -> None:
    # Two devices move B by +1 and by +3: the mean is 2, each is 1 away with half the weight.
    method = Corrected(FedIT(FedITConfig(scale=SCALE)), correction("none"))
    state = method.start(make_space(), make_initial())
    updates = []
    for device, (precision, step) in enumerate((("int8", 1.0), ("nf4", 3.0))):
        tensors = {n: v.copy() for n, v in make_initial().items() if ".lora_" in n}
        tensors["mlp.up.lora_B.weight"] += step
        updates.append(replace(update(precision, 0, f"d{device}"), tensors=tensors))

    rows = drift_of(method.aggregate(state, make_space(), updates))

    assert [row["pull"] for row in rows] == [pytest.approx(0.25), pytest.approx(0.25)]


def test_measured_shares_and_drift_survive_a_restart() -> None:
    run = federation("effective-weight", MIXED[:4], 0)
    run.steps = 5
    for number in range(2):
        run.round(number)
    again = unpack_state(pack_state(run.state))

    given = [
        run.method.broadcast(state, make_space(), work("int4")) for state in (run.state, again)
    ]

    assert drift_of(again) == drift_of(run.state)
    for name, values in given[0].items():
        np.testing.assert_array_equal(values, given[1][name])


def test_the_whole_global_adapter_has_deltas_that_change_nothing() -> None:
    run = federation("compensator", MIXED[:4], 0)

    whole = run.method.global_adapter(run.state, make_space())
    cut = run.method.global_adapter(run.state, make_space(), 2)

    assert not whole["mlp.up.base_delta_A"].any()
    assert not any("base_delta" in name for name in cut)


def test_compensators_need_packages_with_base_deltas() -> None:
    space = make_space()
    bare = replace(space, tensors=space.tensors[:4])
    method = Corrected(FedIT(FedITConfig(scale=SCALE)), correction("compensator"))

    with pytest.raises(ValueError, match="needs base deltas"):
        method.start(bare, make_initial())


def test_a_correction_goes_inside_a_head_start() -> None:
    method = HeadStart(Corrected(FedIT(FedITConfig(scale=SCALE)), correction("none")))

    assert method.name == "fedit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "magic"}, "correction must be one of"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"share": 1.5}, "share must be at most 1"),
        ({"floor": 0.0}, "floor must be above 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CorrectionConfig(**options)  # type: ignore[arg-type]  # what is refused
