# SPDX-License-Identifier: Apache-2.0
"""An update from bytes to arrays, with every rule it must keep.

Nothing is trusted: names, shapes and sizes are checked before a tensor is decoded, so that memory
never exceeds what the plan allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import MalformedTensorError, Tensors, unpack
from lorikit.quantization import QuantizationError, codec
from lorikit.server.errors import RequestError
from lorikit.server.plans import Expected, ExpectedTensor


@dataclass(frozen=True, slots=True)
class Update:
    """What one device sent, decoded and checked."""

    tensors: Tensors
    scalars: Mapping[str, float]


def read_update(data: bytes, expected: Expected, *, max_norm: float) -> Update:
    """Decode an update.

    Args:
        data: A serialised bundle.
        expected: The tensors it must have, no more and no fewer.
        max_norm: Largest joint l2 norm of its adapter tensors.

    Raises:
        RequestError: UPDATE_INVALID; the detail names the tensor and what is wrong with it.
    """
    try:
        bundle = unpack(data)
    except MalformedTensorError as error:
        raise _invalid(str(error)) from error
    _check_names(set(bundle.tensors), set(expected))
    ranks: dict[str, int] = {}
    for name, wanted in expected.items():
        _check_shape(name, bundle.tensors[name].shape, wanted, ranks)
    tensors: Tensors = {}
    for name in expected:
        try:
            tensors[name] = codec(bundle.tensors[name].codec).decode(bundle.tensors[name])
        except QuantizationError as error:
            raise _invalid(f"{name}: {error}") from error
        if not np.isfinite(tensors[name]).all():
            raise _invalid(f"{name}: holds numbers that are not finite")
    for name, value in bundle.scalars.items():
        if not math.isfinite(value):
            raise _invalid(f"scalar {name[:80]!r} is {value}")
    _check_norm(tensors, expected, max_norm)
    return Update(tensors, dict(bundle.scalars))


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
