# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lorikit.proto.plan import ADAPTIVE, WireScheme
from lorikit.proto.tensors import Bundle, Tensors, raw
from lorikit.quantization import QuantizationError, changes

INT4 = WireScheme(codec="int4")


def tensors(rank: int = 8, seed: int = 0, **more: tuple[int, ...]) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"a": (rank, 96), "b": (96, rank), "bias": (7,), **more}
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def bundle(base: Tensors, target: Tensors, scheme: WireScheme = INT4) -> Bundle:
    header = changes.header_of(scheme, seed=3)
    values = changes.difference(base, target)
    return Bundle(changes.encode(values, scheme, header, {}), {}, header)


def rebuilt(base: Tensors, change: Bundle, target: Tensors, max_bytes: int = 1 << 20) -> Tensors:
    return changes.rebuilt(base, change, target, max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("base", "target"),
    [
        (tensors(8), tensors(8, seed=1)),
        (tensors(8), tensors(3, seed=1)),
        (tensors(3), tensors(8, seed=1)),
        (tensors(8, gone=(4, 200)), tensors(8, seed=1, new=(5, 300))),
    ],
    ids=["same shapes", "smaller rank", "larger rank", "other tensors"],
)
@pytest.mark.parametrize(
    ("scheme", "decibels"),
    [(WireScheme(codec="int8-block64"), 40), (INT4, 17), (WireScheme(codec="fp16"), 60)],
    ids=["int8", "int4", "fp16"],
)
def test_change_leads_from_any_base_to_the_target(
    base: Tensors, target: Tensors, scheme: WireScheme, decibels: float
) -> None:
    after = rebuilt(base, bundle(base, target, scheme), target)
    assert after.keys() == target.keys()
    for name, values in target.items():
        noise = np.square(after[name] - values).sum()
        assert 10 * np.log10(np.square(values).sum() / noise) > decibels - 3, name


def test_tensors_that_stay_do_not_travel() -> None:
    base = tensors()
    target = {**base, "a": base["a"] + np.float32(1)}
    change = bundle(base, target)
    assert list(change.tensors) == ["a"]
    after = rebuilt(base, change, target)
    np.testing.assert_array_equal(after["b"], base["b"])


def test_shape_that_changes_travels_even_where_no_value_does() -> None:
    base = tensors(8)
    target = {"a": base["a"][:5], "b": base["b"][:, :5], "bias": base["bias"]}
    after = rebuilt(base, bundle(base, target), target)
    for name, values in target.items():
        np.testing.assert_array_equal(after[name], values)


def test_chain_of_coarse_changes_never_drifts() -> None:
    """What one change leaves out is part of the next: the distance stays that of one change."""
    rng = np.random.default_rng(0)
    exact = tensors()
    held = dict(exact)
    blind = dict(exact)
    distances, blind_distances = [], []
    for _ in range(60):
        before = exact
        exact = {
            n: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in exact.items()
        }
        held = rebuilt(held, bundle(held, exact, WireScheme(codec="int2")), exact)
        step = changes.difference(before, exact)
        shifted = {n: blind[n] + v for n, v in step.items()}
        blind = rebuilt(blind, bundle(blind, shifted, WireScheme(codec="int2")), exact)
        distances.append(float(np.linalg.norm(held["a"] - exact["a"])))
        blind_distances.append(float(np.linalg.norm(blind["a"] - exact["a"])))
    one_step = 0.1 * np.sqrt(exact["a"].size)
    assert max(distances) < 0.6 * one_step
    assert blind_distances[-1] > 3 * max(distances)


def test_equal_arguments_give_equal_bytes_also_with_random_rounding() -> None:
    scheme = WireScheme(codec="int4", stochastic=True, rotation_block=64)
    base, target = tensors(), tensors(seed=1)
    first, again = (rebuilt(base, bundle(base, target, scheme), target) for _ in range(2))
    for name in target:
        np.testing.assert_array_equal(first[name], again[name])


def test_important_tensor_gets_more_bits() -> None:
    target = tensors()
    scheme = WireScheme(codec=ADAPTIVE, budget_bytes=500)
    header = changes.header_of(scheme, seed=0)

    def error(name: str, importance: dict[str, float]) -> float:
        sent = Bundle(changes.encode(target, scheme, header, importance), {}, header)
        after = rebuilt({}, sent, target)
        return float(np.square(after[name] - target[name]).sum())

    assert error("a", {"a": 100.0}) < 0.5 * error("a", {"b": 100.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "wire version 2 is not 1"),
        ({"scheme": "zip"}, "unknown wire scheme 'zip'"),
        ({"delta": False}, "holds no changes"),
    ],
)
def test_header_of_another_kind_is_refused(fields: dict[str, object], message: str) -> None:
    change = bundle(tensors(), tensors(seed=1))
    assert change.wire is not None
    header = dataclasses.replace(change.wire, **fields)  # type: ignore[arg-type]  # of any kind
    with pytest.raises(QuantizationError, match=message):
        rebuilt(tensors(), dataclasses.replace(change, wire=header), tensors())


def test_tensor_that_is_neither_held_nor_sent_is_named() -> None:
    with pytest.raises(QuantizationError, match="more: neither held nor sent"):
        rebuilt(tensors(), bundle(tensors(), tensors(seed=1)), tensors(more=(2, 2)))


def test_result_larger_than_announced_is_not_decoded() -> None:
    with pytest.raises(QuantizationError, match="exceeds 1000"):
        rebuilt(tensors(), bundle(tensors(), tensors(seed=1)), tensors(), max_bytes=1000)


def test_bundle_without_a_header_is_no_change() -> None:
    whole = Bundle({name: raw(values) for name, values in tensors().items()})
    with pytest.raises(QuantizationError, match="holds no changes"):
        rebuilt(tensors(), whole, tensors())
