# SPDX-License-Identifier: Apache-2.0
"""Every method learns: devices that really descend, on a problem whose answer is known.

Each module shall become a given matrix of rank 2 (or a bias a given vector). A device descends on
the squared distance from the matrix of its own, which differs from the common one; the mean of the
devices' matrices is the common one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.methods import METHODS, build_method
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, Participant
from lorikit.server.methods.base_delta import delta_tensors

Targets = dict[str, np.ndarray]

DEVICES, ROUNDS, STEPS, RATE, S = 4, 20, 25, 0.02, 2.0
REACHED = {"fedra": 0.3, "ffa-lora": 0.6, "frlora": 0.2, "legend": 0.3, "lora-a2": 0.2}
"""Share of the first distance that may be left; 0.1 for the other methods.

A frozen A leaves what its rows do not span, turns take time, and depths and sub-models leave what
few devices reach.
"""


def targets(space: AdapterSpace, seed: int, size: float) -> Targets:
    rng = np.random.default_rng(seed)
    wanted: Targets = {}
    for a, b in space.pairs():
        left, right = rng.normal(size=(int(b.shape[0]), 2)), rng.normal(size=(2, int(a.shape[1])))
        wanted[a.module] = size * left @ right
    for tensor in space.named("bias", "norm"):
        wanted[tensor.name] = size * rng.normal(size=int(tensor.shape[0]))
    return wanted


def device_targets(space: AdapterSpace, common: Targets) -> list[Targets]:
    """Common matrices with differences that add up to zero over the devices."""
    pulls = [targets(space, 10 + k, 0.2) for k in range(DEVICES - 1)]
    last: Targets = {n: -np.sum([pull[n] for pull in pulls], axis=0) for n in common}
    return [{n: common[n] + pull[n] for n in common} for pull in (*pulls, last)]


def product(adapter: Tensors, a: AdapterTensor, b: AdapterTensor) -> np.ndarray:
    own = S * adapter[b.name].astype("f8") @ adapter[a.name]
    delta_a, delta_b = delta_tensors(a, b)
    if delta_a.name in adapter:
        own = own + adapter[delta_b.name].astype("f8") @ adapter[delta_a.name]
    return np.asarray(own)


def distance(adapter: Tensors, space: AdapterSpace, wanted: Targets, start: Targets) -> float:
    """From what is wanted on top of the start, over everything that can move."""
    squares: list[float] = [
        np.sum((product(adapter, a, b) - start.get(a.module, 0.0) - wanted[a.module]) ** 2)
        for a, b in space.pairs()
    ]
    squares += [float(np.sum((adapter[t.name] - wanted[t.name]) ** 2)) for t in space.named("bias")]
    return float(np.sqrt(sum(squares)))


def descend(
    received: Tensors, space: AdapterSpace, work: Assignment, wanted: Targets, start: Targets
) -> Tensors:
    """Gradient steps on the tensors that the assignment trains."""
    adapter = dict(received)
    for _ in range(STEPS):
        for a, b in space.pairs():
            if a.layer not in work.trained_layers:
                continue
            off = product(adapter, a, b) - start.get(a.module, 0.0) - wanted[a.module]
            slopes = {a: S * adapter[b.name].T @ off, b: S * off @ adapter[a.name].T}
            for tensor, slope in slopes.items():
                if tensor.role in work.train_roles:
                    adapter[tensor.name] = (adapter[tensor.name] - RATE * slope).astype("f4")
        for tensor in space.named("bias"):
            away = adapter[tensor.name] - wanted[tensor.name]
            adapter[tensor.name] = (adapter[tensor.name] - RATE * away).astype("f4")
    trained = [
        t.name
        for t in space.tensors
        if t.role in work.train_roles and (t.layer in work.trained_layers or t.layer < 0)
    ]
    return {name: adapter[name] for name in trained}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_common_model_comes_near_to_what_is_wanted(
    name: str,
    spaces: Callable[..., AdapterSpace],
    initials: Callable[..., Tensors],
    device: Callable[..., Participant],
) -> None:
    space = spaces(name, layer_count=2)
    initial = initials(space, principal=name == "frlora")
    small = {n: np.float32(0.3) * v for n, v in initial.items()}
    method = build_method(name)
    state = method.start(space, small)
    adapter = method.global_adapter(state, space)
    start = {a.module: product(adapter, a, b) for a, b in space.pairs()}
    common = targets(space, 0, 0.5)
    own = device_targets(space, common)
    cohort = [
        device(f"d{k}", memory_limit_bytes=4 + k, max_layers=1 + k, max_depth=1 + k)
        for k in range(DEVICES)
    ]
    first = distance(adapter, space, common, start)
    for number in range(ROUNDS):
        work = method.assign(state, space, number, cohort, np.random.default_rng(number))
        updates = [
            Contribution(
                device_id=w.device_id,
                assignment=w,
                tensors=descend(method.broadcast(state, space, w), space, w, wanted, start),
                scalars={},
                examples=10,
            )
            for w, wanted in zip(work, own, strict=True)
        ]
        state = method.aggregate(state, space, updates)

    last = distance(method.global_adapter(state, space), space, common, start)
    assert last < REACHED.get(name, 0.1) * first
