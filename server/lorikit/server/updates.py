# SPDX-License-Identifier: Apache-2.0
"""An update from bytes to arrays, with every rule it must keep.

Nothing is trusted: names, shapes and sizes are checked before a tensor is decoded, so that memory
never exceeds what the plan allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import (
    Bundle,
    Encoded,
    Float32,
    MalformedTensorError,
    Tensors,
    WireHeader,
    unpack,
)
from lorikit.quantization import QuantizationError, codec, wire
from lorikit.server.errors import RequestError
from lorikit.server.plans import Expected, ExpectedTensor, largest_update_bytes


@dataclass(frozen=True, slots=True)
class Update:
    """What one device sent, decoded and checked."""

    tensors: Tensors
    scalars: Mapping[str, float]
    changes: frozenset[str] = frozenset()
    """Tensors that are still changes against the adapter the device received."""


def read_update(data: bytes, expected: Expected, *, max_norm: float) -> Update:
    """Decode an update.

    Args:
        data: A serialised bundle.
        expected: The tensors it must have, no more and no fewer.
        max_norm: Largest joint l2 norm of its adapter tensors as they travel: of the changes, where
            the plan asked for changes.

    Raises:
        RequestError: UPDATE_INVALID; the detail names the tensor and what is wrong with it.
    """
    try:
        bundle = wire.expanded(unpack(data), max_bytes=largest_update_bytes(expected))
        _check_header(bundle, expected)
    except (MalformedTensorError, QuantizationError) as error:
        raise _invalid(str(error)) from error
    _check_names(set(bundle.tensors), set(expected))
    ranks: dict[str, int] = {}
    for name, wanted in expected.items():
        _check_shape(name, bundle.tensors[name].shape, wanted, ranks)
    tensors: Tensors = {}
    for name in expected:
        try:
            header = None if expected[name].is_statistic else bundle.wire
            tensors[name] = _decoded(bundle.tensors[name], name, header)
        except QuantizationError as error:
            raise _invalid(f"{name}: {error}") from error
        if not np.isfinite(tensors[name]).all():
            raise _invalid(f"{name}: holds numbers that are not finite")
    for name, value in bundle.scalars.items():
        if not math.isfinite(value):
            raise _invalid(f"scalar {name[:80]!r} is {value}")
    _check_norm(tensors, expected, max_norm)
    changes = frozenset(name for name, wanted in expected.items() if wanted.is_change)
    return Update(tensors, dict(bundle.scalars), changes)


def with_received(update: Update, received: Tensors) -> Update:
    """The update with its changes added to the adapter that the device received.

    A tensor whose rank was pruned is compared with the first part of what was received.
    """
    tensors = dict(update.tensors)
    for name in update.changes:
        change = tensors[name]
        tensors[name] = received[name][tuple(slice(length) for length in change.shape)] + change
    return dataclasses.replace(update, tensors=tensors, changes=frozenset())


def read_adapter(data: bytes) -> Tensors:
    """The adapter that devices received, from the blob they got."""
    bundle = unpack(data)
    return {name: codec(each.codec).decode(each) for name, each in bundle.tensors.items()}


def _check_header(bundle: Bundle, expected: Expected) -> None:
    """Refuse an update that does not travel as its plan asked.

    Raises:
        QuantizationError: Unknown version or scheme, or values where changes were asked for.
    """
    if bundle.wire is not None:
        wire.check_header(bundle.wire)
    sends_changes = bundle.wire is not None and bundle.wire.delta
    if sends_changes != any(wanted.is_change for wanted in expected.values()):
        kinds = ("absolute values", "changes")
        sent, asked = kinds if not sends_changes else reversed(kinds)
        raise QuantizationError(f"the update holds {sent}, the plan asked for {asked}")


def _decoded(encoded: Encoded, name: str, header: WireHeader | None) -> Float32:
    if header is None:
        return codec(encoded.codec).decode(encoded)
    return wire.decode(encoded, name, header)


def _check_names(given: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - given):
        raise _invalid(f"{missing[0]}: missing, with {len(missing) - 1} more")
    if extra := sorted(given - wanted):
        raise _invalid(f"{extra[0][:200]}: not asked for, with {len(extra) - 1} more")


def _check_shape(
    name: str, shape: tuple[int, ...], wanted: ExpectedTensor, ranks: dict[str, int]
) -> None:
    if wanted.rank_axis is None or len(shape) != len(wanted.shape):
        if shape != wanted.shape:
            raise _invalid(f"{name}: shape {shape} is not {wanted.shape}")
        return
    axis = wanted.rank_axis
    rank = shape[axis]
    if shape[:axis] + shape[axis + 1 :] != wanted.shape[:axis] + wanted.shape[axis + 1 :]:
        raise _invalid(f"{name}: shape {shape} is not {wanted.shape}")
    if not 1 <= rank <= wanted.shape[axis]:
        raise _invalid(f"{name}: rank {rank} lies outside 1..{wanted.shape[axis]}")
    if ranks.setdefault(wanted.module, rank) != rank:
        raise _invalid(f"{name}: rank {rank} differs from {ranks[wanted.module]} of its pair")


def _check_norm(tensors: Tensors, expected: Expected, max_norm: float) -> None:
    squares = sum(
        float(np.vdot(tensor.astype(np.float64), tensor.astype(np.float64)))
        for name, tensor in tensors.items()
        if not expected[name].is_statistic
    )
    if math.sqrt(squares) > max_norm:
        raise _invalid(f"joint norm {math.sqrt(squares):.6g} exceeds the limit of {max_norm:.6g}")


def _invalid(detail: str) -> RequestError:
    return RequestError(ErrorCode.UPDATE_INVALID, detail)
