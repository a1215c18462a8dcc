# SPDX-License-Identifier: Apache-2.0
"""FLoRA, FedEx-LoRA and FRLoRA: what goes into the base, and what the device is left with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.methods import build_method
from lorikit.server.methods.base import AdapterSpace, Contribution, Method, Participant, State
from lorikit.server.methods.base_delta import delta_tensors, with_deltas
from lorikit.server.methods.fedex_lora import FedExLoRA, FedExLoRAConfig
from lorikit.server.methods.flora import FLoRA, FLoRAConfig
from lorikit.server.methods.frlora import FRLoRA, FRLoRAConfig
from lorikit.server.methods.principal import principal_start

Devices = Callable[..., Participant]
Trainer = Callable[..., Contribution]
RNG = np.random.default_rng(0)
NAMES = ("fedex-lora", "flora", "frlora")
S = 2.0
SHARES = (0.1, 0.2, 0.3, 0.4)
EQUAL = (0.25, 0.25, 0.25, 0.25)


def played(
    method: Method,
    state: State,
    space: AdapterSpace,
    device: Devices,
    trainer: Trainer,
    number: int = 0,
) -> tuple[State, list[Contribution]]:
    """One round of four devices with shares 0.1 to 0.4 and memory for ranks 6, 4, 2 and 2."""
    cohort = [device(f"d{i}", memory_limit_bytes=m) for i, m in enumerate((6, 4, 2, 1))]
    work = method.assign(state, space, number, cohort, np.random.default_rng(number))
    updates = [
        trainer(method, state, space, w, examples=10 * (i + 1), seed=10 * number + i)
        for i, w in enumerate(work)
    ]
    return method.aggregate(state, space, updates), updates


def mean_product(updates: list[Contribution], a: AdapterTensor, b: AdapterTensor) -> np.ndarray:
    """The definition, with the d_out x d_in matrices formed."""
    return np.asarray(
        sum(
            p * S * u.tensors[b.name].astype("f8") @ u.tensors[a.name]
            for p, u in zip(SHARES, updates, strict=True)
        )
    )


def mean_of(
    updates: list[Contribution], name: str, shares: tuple[float, ...] = SHARES
) -> np.ndarray:
    """Weighted mean of one tensor, in float64."""
    parts = [p * u.tensors[name].astype("f8") for p, u in zip(shares, updates, strict=True)]
    return np.asarray(np.sum(parts, axis=0))


def delta_of(state: State, a: AdapterTensor, b: AdapterTensor) -> np.ndarray:
    delta_a, delta_b = delta_tensors(a, b)
    return np.asarray(state.tensors[delta_b.name].astype("f8") @ state.tensors[delta_a.name])


@pytest.mark.parametrize("name", ["flora"])
def test_flora_merges_the_stack_with_each_share_applied_once(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """[p_1 A_1; ...] under [B_1 ...] is the mean; p_k on both sides would be its square."""
    method = FLoRA()
    state, updates = played(method, method.start(space, initial), space, device, trainer)

    for a, b in space.pairs():
        stacked_a = np.concatenate(
            [p * u.tensors[a.name] for p, u in zip(SHARES, updates, strict=True)]
        )
        stacked_b = np.concatenate([u.tensors[b.name] for u in updates], axis=1)
        np.testing.assert_allclose(
            delta_of(state, a, b), S * stacked_b.astype("f8") @ stacked_a, atol=1e-4
        )
        assert stacked_a.shape[0] == 6 + 4 + 2 + 2  # not rank times number of devices


@pytest.mark.parametrize("name", ["flora"])
def test_flora_starts_each_round_from_another_a_and_b_zero(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = FLoRA()
    state = method.start(space, initial)
    a, b = space.pairs()[0]
    seen = [initial[a.name]]
    for number in range(2):
        state, _ = played(method, state, space, device, trainer, number)
        assert not state.tensors[b.name].any()
        assert all(not np.array_equal(state.tensors[a.name], earlier) for earlier in seen)
        assert np.abs(state.tensors[a.name]).max() <= 1 / np.sqrt(5)
        seen.append(state.tensors[a.name])


@pytest.mark.parametrize("name", ["flora"])
def test_flora_sends_no_device_the_factors_of_another(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """The authors' stack shows every device everybody's adapter; a thin SVD of the sum does not."""
    method = FLoRA()
    state, updates = played(method, method.start(space, initial), space, device, trainer)

    sent = method.broadcast(state, space, updates[0].assignment)

    rows = np.concatenate([v for n, v in sent.items() if n.endswith("query.base_delta_A")])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for update in updates:
        own = np.concatenate(
            [v for n, v in update.tensors.items() if n.endswith("query.lora_A.weight")]
        )
        own = own / np.linalg.norm(own, axis=1, keepdims=True)
        assert np.abs(rows @ own.T).max() < 0.999


@pytest.mark.parametrize("name", ["fedex-lora"])
def test_fedex_adds_the_residual_and_not_its_transpose(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """The authors' code adds the transpose, which square GPT-2 maps hide; ours are 9 x 5."""
    method = FedExLoRA()
    state, updates = played(method, method.start(space, initial), space, device, trainer)

    for a, b in space.pairs():
        mean_a = mean_of(updates, a.name)
        mean_b = mean_of(updates, b.name)
        residual = mean_product(updates, a, b) - S * mean_b @ mean_a
        assert residual.shape == (b.shape[0], a.shape[1])
        np.testing.assert_allclose(delta_of(state, a, b), residual, atol=1e-4)
        np.testing.assert_allclose(state.tensors[a.name], mean_a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.tensors[b.name], mean_b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fedex-lora"])
def test_fedex_small_residuals_of_many_rounds_are_not_lost(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """Added to a 4-bit weight they would be; here they stand beside it in float32."""
    method = FedExLoRA()
    state = method.start(space, initial)
    a, b = space.pairs()[0]
    expected = np.zeros((9, 5))
    for number in range(20):
        before = state
        state, updates = played(method, state, space, device, trainer, number)
        small = [
            replace(
                u,
                tensors={
                    n: before.tensors[n] + 1e-3 * (v - before.tensors[n])
                    for n, v in u.tensors.items()
                },
            )
            for u in updates
        ]
        state = method.aggregate(before, space, small)
        adapter = state.tensors
        expected += mean_product(small, a, b) - S * adapter[b.name].astype("f8") @ adapter[a.name]

    assert 0 < np.linalg.norm(expected) < 1e-3
    assert np.linalg.norm(delta_of(state, a, b) - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["frlora"])
def test_frlora_leaves_the_function_as_it_was_at_the_start(
    space: AdapterSpace, initial: Tensors
) -> None:
    state = FRLoRA().start(space, initial)

    for a, b in space.pairs():
        product = S * initial[b.name].astype("f8") @ initial[a.name]
        np.testing.assert_allclose(delta_of(state, a, b) + product, 0, atol=1e-5)


@pytest.mark.parametrize("name", ["frlora"])
def test_frlora_folds_the_change_of_the_plain_mean_and_goes_back_to_the_principal_part(
    space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    method = FRLoRA()
    start = method.start(space, initial)
    state, updates = played(method, start, space, device, trainer)

    for a, b in space.pairs():
        mean_a = mean_of(updates, a.name, EQUAL)
        mean_b = mean_of(updates, b.name, EQUAL)
        change = S * (mean_b @ mean_a - initial[b.name].astype("f8") @ initial[a.name])
        wanted = delta_of(start, a, b) + change
        np.testing.assert_allclose(delta_of(state, a, b), wanted, atol=1e-4)
        assert np.array_equal(state.tensors[a.name], initial[a.name])
        assert np.array_equal(state.tensors[b.name], initial[b.name])
    head = "classifier.weight"
    mean = mean_of(updates, head, EQUAL)
    np.testing.assert_allclose(state.tensors[head], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["frlora"])
def test_frlora_refuses_a_start_that_is_no_principal_part(
    space: AdapterSpace, initials: Callable[..., Tensors]
) -> None:
    with pytest.raises(ValueError, match=r"principal part of the base, and B of .* is 0; .* fedex"):
        FRLoRA().start(space, initials(space))


@pytest.mark.parametrize("name", ["frlora"])
def test_frlora_needs_room_for_the_principal_part(space: AdapterSpace, initial: Tensors) -> None:
    with pytest.raises(ValueError, match="delta_rank 5 is below the rank 6"):
        FRLoRA(FRLoRAConfig(delta_rank=5)).start(space, initial)


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_on_the_rank_keeps_the_best_part_and_says_what_it_cut(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """Rank 3 of changes of rank 5, without the limits of frlora's principal part."""
    rank = {"rank": 3} if name == "frlora" else {}
    free, tight = (build_method(name, {**rank, "delta_rank": limit}) for limit in (0, 3))
    start = free.start(space, initial)
    state, updates = played(free, start, space, device, trainer)
    cut = tight.aggregate(start, space, updates)

    losses = []
    for a, b in space.pairs():
        full, kept = delta_of(state, a, b), delta_of(cut, a, b)
        u, values, vt = np.linalg.svd(full)
        np.testing.assert_allclose(kept, (u[:, :3] * values[:3]) @ vt[:3], atol=1e-4)
        losses.append(np.linalg.norm(values[3:]) / np.linalg.norm(values))
        assert cut.tensors[delta_tensors(a, b)[0].name].shape == (3, a.shape[1])
    assert state.scalars["delta_lost"] == 0
    assert cut.scalars["delta_lost"] == pytest.approx(max(losses), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_adapter_holds_base_and_lora_together(
    name: str, space: AdapterSpace, initial: Tensors, device: Devices, trainer: Trainer
) -> None:
    """A PEFT folder knows no base deltas: the pair of the run's largest rank holds them whole."""
    method = build_method(name)
    state, _ = played(method, method.start(space, initial), space, device, trainer)

    exported = method.global_adapter(state, space, rank=space.max_rank)

    plain = {t.name for t in space.tensors if t.role in ("lora_A", "lora_B", "head")}
    assert set(exported) == plain
    for a, b in space.pairs():
        whole = (
            delta_of(state, a, b) + S * state.tensors[b.name].astype("f8") @ state.tensors[a.name]
        )
        product = S * exported[b.name].astype("f8") @ exported[a.name]
        np.testing.assert_allclose(product, whole, atol=1e-4)


def test_the_contract_for_a_package_with_base_deltas(spaces: Callable[..., AdapterSpace]) -> None:
    space = with_deltas(spaces("fedit"))

    delta_a, delta_b = (t for t in space.named("delta_A", "delta_B") if ".3.query" in t.name)

    module = "bert.encoder.layer.3.query"
    assert (delta_a.name, delta_a.shape) == (f"{module}.base_delta_A", ("rank", 5))
    assert (delta_b.name, delta_b.shape) == (f"{module}.base_delta_B", (9, "rank"))
    assert delta_a.module == delta_b.module == f"{module}.base_delta"  # a rank of its own
    assert not delta_a.trained
    assert delta_a.layer == 3
    assert with_deltas(space) is space


@pytest.mark.parametrize("config", [FLoRAConfig, FedExLoRAConfig, FRLoRAConfig])
@pytest.mark.parametrize(
    "options", [{"delta_rank": -1}, {"scale": 0.0}, {"weighting": "norm"}], ids=str
)
def test_bad_options_are_refused(config: Callable[..., object], options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        config(**options)


def test_principal_parts_by_hand(spaces: Callable[..., AdapterSpace]) -> None:
    """W0 = diag(8, 2): rank 1 at s = 2 is B0 A0 = diag(4, 0), split as 2 and 2."""
    space = spaces("frlora", layer_count=1, max_rank=1)
    a, b = space.pairs()[0]
    weight = np.zeros((9, 5), np.float32)
    weight[0, 0], weight[1, 1] = 8, 2

    start = principal_start(
        space, {one.module: weight if one is a else weight.T for one, _ in space.pairs()}, scale=2.0
    )

    np.testing.assert_allclose(start[a.name], [[2, 0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(start[b.name][:, 0], [2, *[0] * 8], atol=1e-6)


def test_frlora_starts_from_a_model_without_its_principal_part(
    spaces: Callable[..., AdapterSpace], initials: Callable[..., Tensors]
) -> None:
    """W0 + D holds the singular values of W0 beyond the rank, and none of the first ones."""
    space = spaces("frlora", max_rank=2)
    rng = np.random.default_rng(0)
    weights = {
        a.module: rng.normal(size=(int(b.shape[0]), int(a.shape[1]))).astype(np.float32)
        for a, b in space.pairs()
    }

    state = FRLoRA().start(space, {**initials(space), **principal_start(space, weights, scale=S)})

    for a, b in space.pairs():
        left = weights[a.module] + delta_of(state, a, b)
        values = np.linalg.svd(weights[a.module], compute_uv=False)
        got = np.linalg.svd(left, compute_uv=False)
        np.testing.assert_allclose(got, [*values[2:], 0, 0], atol=1e-5)
