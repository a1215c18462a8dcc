# SPDX-License-Identifier: Apache-2.0
"""The operations methods put into plans, against the device's own code for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from lorikit.proto.manifest import AdapterTensor, Manifest, Task
from lorikit.proto.tensors import Tensors
from lorikit.sdk._operations import FINAL_OPERATIONS, GRADIENT_OPERATIONS, build
from lorikit.sdk._operations.class_sums import COUNTS, SUMS
from lorikit.sdk.engines._signature import check_adapter
from lorikit.server.aggregate.norms import tail_score
from lorikit.server.methods import METHODS, HeadStart, build_method
from lorikit.server.methods.base import AdapterSpace, Contribution, Participant
from lorikit.server.methods.head_start import CLASS_COUNTS, CLASS_SUMS


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_device_accepts_every_operation(
    name: str, space: AdapterSpace, initial: Tensors, device: Callable[..., Participant]
) -> None:
    method = HeadStart(build_method(name))
    state = method.start(space, initial)
    cohort = [device("a")]
    rng = np.random.default_rng(0)
    [start] = method.assign(state, space, 0, cohort, rng)
    [work] = method.method.assign(state, space, 0, cohort, rng)

    for assignment in (start, work):
        for operation in assignment.gradient_operations:
            build(operation, GRADIENT_OPERATIONS)
        for operation in assignment.operations:
            build(operation, FINAL_OPERATIONS)
    assert start.operations


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_device_accepts_every_adapter_that_is_broadcast(
    name: str,
    space: AdapterSpace,
    initial: Tensors,
    device: Callable[..., Participant],
    trainer: Callable[..., Contribution],
) -> None:
    """Its own check of an adapter against the package, over rounds with unlike devices."""
    method = build_method(name)
    state = method.start(space, initial)
    cohort = [device("a", memory_limit_bytes=4, max_layers=2), device("b", memory_limit_bytes=2)]
    for number in range(4):
        work = method.assign(state, space, number, cohort, np.random.default_rng(number))
        for assignment in work:
            layers = (-1, *assignment.kept_layers)
            held = tuple(t for t in space.tensors if t.layer in layers)
            check_adapter(manifest_of(held, space), method.broadcast(state, space, assignment))
        state = method.aggregate(state, space, [trainer(method, state, space, w) for w in work])


def manifest_of(tensors: tuple[AdapterTensor, ...], space: AdapterSpace) -> Manifest:
    return Manifest(
        model="small",
        model_digest="0" * 64,
        architecture="BertForSequenceClassification",
        layer_count=space.layer_count,
        precision="fp32",
        kept_layers=tuple(range(space.layer_count)),
        lowest_trained_layer=0,
        task=Task(kind="sequence-classification", labels=("a", "b", "c")),
        graphs=(),
        adapter=tensors,
        weights=(),
        weight_blobs=(),
        tokenizer=None,
        probe=None,
    )


def test_both_ends_call_the_statistics_the_same() -> None:
    assert (SUMS, COUNTS) == (CLASS_SUMS, CLASS_COUNTS)


def test_the_device_adds_the_penalty_of_the_specification(
    space: AdapterSpace, initial: Tensors, device: Callable[..., Participant]
) -> None:
    method = build_method("hetlora", {"gamma": 0.5, "penalty": 0.08})
    rng = np.random.default_rng(0)
    adapter = {
        n: v + rng.normal(size=v.shape).astype(np.float32)
        for n, v in method.start(space, initial).tensors.items()
    }
    [work] = method.assign(method.start(space, initial), space, 0, [device("a")], rng)
    [operation] = work.gradient_operations
    pairs = [(a.name, b.name) for a, b in space.pairs()]

    value, _ = build(operation, GRADIENT_OPERATIONS).term(adapter, pairs)

    tail = math.floor(0.5 * 6)
    score = sum(tail_score(adapter[a], adapter[b], tail) for a, b in pairs)
    assert value == pytest.approx(0.08 / len(pairs) * score, rel=1e-6)
