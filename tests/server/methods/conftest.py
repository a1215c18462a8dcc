# SPDX-License-Identifier: Apache-2.0
"""A small model's adapter space with non-square modules, and devices that pretend to train."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Tensors
from lorikit.server.methods import FACTS
from lorikit.server.methods.base import (
    AdapterSpace,
    Assignment,
    Contribution,
    Method,
    Participant,
    State,
)
from lorikit.server.methods.base_delta import DELTA_ROLES, with_deltas

WIDTH, INNER, CLASSES = 5, 9, 3

SpaceMaker = Callable[..., AdapterSpace]
Trainer = Callable[..., Contribution]


def make_space(layer_count: int = 4, max_rank: int = 6, kind: str = "lora") -> AdapterSpace:
    """A small model: LoRA pairs (``lora``), with base deltas (``delta``), or ``bias`` tensors."""
    tensors = []
    for layer in range(layer_count):
        for part, d_in, d_out in (("query", WIDTH, INNER), ("dense", INNER, WIDTH)):
            module = f"bert.encoder.layer.{layer}.{part}"
            tensors += [
                _tensor(f"{module}.lora_A.weight", "lora_A", module, layer, ("rank", d_in)),
                _tensor(f"{module}.lora_B.weight", "lora_B", module, layer, (d_out, "rank")),
            ]
            if kind == "bias":
                norm = f"bert.encoder.layer.{layer}.{part}_norm"
                tensors[-2:] = [
                    _tensor(f"{module}.bias", "bias", module, layer, (d_out,)),
                    _tensor(f"{norm}.weight", "norm", norm, layer, (d_out,)),
                ]
    tensors += [
        _tensor("classifier.weight", "head", "classifier", -1, (CLASSES, WIDTH)),
        _tensor("classifier.bias", "head", "classifier", -1, (CLASSES,)),
    ]
    space = AdapterSpace(tensors=tuple(tensors), layer_count=layer_count, max_rank=max_rank)
    return with_deltas(space) if kind == "delta" else space


def _tensor(
    name: str, role: str, module: str, layer: int, shape: tuple[int | str, ...]
) -> AdapterTensor:
    return AdapterTensor(
        name=name, role=role, module=module, layer=layer, shape=shape, trained=True
    )


def make_initial(space: AdapterSpace, *, principal: bool = False) -> Tensors:
    """Start values as a compiler makes them: base deltas are 0, of rank 1.

    B is 0, too, or not, as for principal parts of a weight.
    """
    rng = np.random.default_rng(1)
    out: Tensors = {}
    for tensor in space.tensors:
        rank = 1 if tensor.role in DELTA_ROLES else space.max_rank
        shape = [rank if length == "rank" else int(length) for length in tensor.shape]
        values = rng.normal(size=shape)
        is_zero = tensor.role in DELTA_ROLES or (tensor.role == "lora_B" and not principal)
        out[tensor.name] = (0 * values if is_zero else values).astype(np.float32)
    return out


def make_device(device_id: str, **fields: object) -> Participant:
    values: dict[str, object] = {
        "memory_limit_bytes": 1 << 30,
        "max_rank": 64,
        "max_depth": 64,
        "max_layers": 64,
        "seconds_per_step": 1.0,
    }
    return Participant(device_id=device_id, **{**values, **fields})  # type: ignore[arg-type]  # any field


def train(
    method: Method,
    state: State,
    space: AdapterSpace,
    assignment: Assignment,
    *,
    examples: int = 10,
    seed: int = 0,
    **scalars: float,
) -> Contribution:
    """What a device sends: its trained tensors, moved by noise from what it received."""
    rng = np.random.default_rng(seed)
    if not assignment.train:
        return class_sums(assignment, rng, examples)
    received = method.broadcast(state, space, assignment)
    trained = [
        t.name
        for t in space.tensors
        if t.role in assignment.train_roles
        and (t.layer in assignment.trained_layers or (t.layer < 0 and assignment.train_head))
    ]
    tensors = {
        name: received[name] + rng.normal(size=received[name].shape).astype(np.float32)
        for name in trained
    }
    return Contribution(
        device_id=assignment.device_id,
        assignment=assignment,
        tensors=tensors,
        scalars={"examples": float(examples), **scalars},
        examples=examples,
    )


def class_sums(assignment: Assignment, rng: np.random.Generator, examples: int) -> Contribution:
    """What a device sends that was asked for class sums: all its examples of random classes."""
    labels = rng.integers(CLASSES, size=examples)
    features = rng.normal(size=(examples, WIDTH))
    one_hot = np.eye(CLASSES)[labels]
    return Contribution(
        device_id=assignment.device_id,
        assignment=assignment,
        tensors={
            "statistics.class_sums": (one_hot.T @ features).astype(np.float32),
            "statistics.class_counts": one_hot.sum(axis=0).astype(np.float32),
        },
        scalars={"examples": float(examples)},
        examples=examples,
    )


@pytest.fixture
def name() -> str:
    """The method of a test that is not run for several."""
    return "fedit"


@pytest.fixture
def space(name: str) -> AdapterSpace:
    """The kind of model that the method ``name`` is for."""
    return make_space(kind=kind_of(name))


@pytest.fixture
def spaces() -> SpaceMaker:
    """Makes the kind of model a method is for: ``spaces("flora", max_rank=8)``."""
    return lambda name="fedit", **sizes: make_space(kind=kind_of(name), **sizes)


def kind_of(name: str) -> str:
    needs = FACTS[name].needs if name in FACTS else ()
    if "delta_A" in needs:
        return "delta"
    return "bias" if name in ("fedbf", "fedpeft-bias") else "lora"


@pytest.fixture
def initial(name: str, space: AdapterSpace) -> Tensors:
    return make_initial(space, principal=name == "frlora")


@pytest.fixture
def initials() -> Callable[..., Tensors]:
    return make_initial


@pytest.fixture
def device() -> Callable[..., Participant]:
    return make_device


@pytest.fixture
def trainer() -> Trainer:
    return train
