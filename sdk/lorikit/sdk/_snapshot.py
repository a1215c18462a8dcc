# SPDX-License-Identifier: Apache-2.0
"""Where a task stands, and its form in the journal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lorikit.proto.plan import Plan
from lorikit.proto.tensors import Array, Bundle, Encoded, Tensors, pack, raw
from lorikit.sdk._optimizer import Slots

Meta = Mapping[str, int | float | str]

_ADAPTER = "adapter/"
_OPTIMIZER = "optimizer/"
_PRODUCED = "produced/"
_IMPORTANCE = "importance/"


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """All that a task's training depends on beside plan, package, data and received adapter."""

    adapter: Tensors
    """Every adapter tensor, the trained ones as they are now."""
    slots: dict[str, Slots] = field(default_factory=dict)
    """Optimiser state of the phase by trained tensor."""
    importance: dict[str, float] = field(default_factory=dict)
    """Weight of an error in the tensors that earlier phases trained."""
    produced: Tensors = field(default_factory=dict)
    """What training makes beside the adapter, by the name it can be sent under."""
    phase: int = 0
    step: int = 0
    """Optimiser steps of the phase done."""
    examples: int = 0
    """Examples seen in all phases, counted with repetition."""
    labels: int = 0
    """Their labels: as many, or more where tokens are labelled."""
    correct: float = 0.0
    first_loss: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0
    """Time spent training, earlier processes included."""


_NUMBERS = (
    "phase",
    "step",
    "examples",
    "labels",
    "correct",
    "first_loss",
    "last_loss",
    "seconds",
)


def fingerprint(plan: Plan, adapter: Tensors) -> str:
    """Digest of what a journal belongs to: the plan and the received adapter."""
    digest = hashlib.sha256()
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    digest.update(json.dumps(fields, sort_keys=True, default=_plain).encode())
    digest.update(pack(Bundle({name: raw(value) for name, value in adapter.items()})))
    return digest.hexdigest()


def to_journal(snapshot: Snapshot, identity: str) -> tuple[Bundle, Meta]:
    """The snapshot as a journal keeps it."""
    tensors = {_ADAPTER + name: raw(value) for name, value in snapshot.adapter.items()}
    for name, slots in snapshot.slots.items():
        for slot, value in slots.items():
            tensors[f"{_OPTIMIZER}{slot}/{name}"] = _whole(value)
    for name, value in snapshot.produced.items():
        tensors[_PRODUCED + name] = raw(value)
    numbers: dict[str, int | float | str] = {n: getattr(snapshot, n) for n in _NUMBERS}
    scalars = {_IMPORTANCE + name: value for name, value in snapshot.importance.items()}
    return Bundle(tensors, scalars), {**numbers, "fingerprint": identity}


def from_journal(state: Bundle, meta: Meta, identity: str) -> Snapshot | None:
    """The saved snapshot, or None if it belongs to another plan or adapter."""
    if meta.get("fingerprint") != identity:
        return None
    snapshot = Snapshot(adapter={}, **{name: meta[name] for name in _NUMBERS})  # type: ignore[arg-type]  # as to_journal wrote them
    for name, value in state.scalars.items():
        snapshot.importance[name.removeprefix(_IMPORTANCE)] = value
    for name, encoded in state.tensors.items():
        values = encoded.parts["values"]
        if name.startswith(_OPTIMIZER):
            slot, _, tensor = name.removeprefix(_OPTIMIZER).partition("/")
            snapshot.slots.setdefault(tensor, {})[slot] = values
        elif name.startswith(_PRODUCED):
            snapshot.produced[name.removeprefix(_PRODUCED)] = values.astype(np.float32)
        else:
            snapshot.adapter[name.removeprefix(_ADAPTER)] = values.astype(np.float32)
    return snapshot


def _whole(values: Array) -> Encoded:
    """An array in its own element type."""
    return Encoded(values.dtype.name, values.shape, {"values": values})


def _plain(value: object) -> object:
    """JSON form of what a plan is made of."""
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a plan holds no {type(value).__name__}")
