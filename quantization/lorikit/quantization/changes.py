# SPDX-License-Identifier: Apache-2.0
"""Changes of a set of tensors: the codec of each, and an adapter rebuilt from one that is held.

What is rebuilt has the same bits everywhere: values are decoded and added in float32, element by
element, in one order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from lorikit.proto.plan import ADAPTIVE, WireScheme
from lorikit.proto.tensors import Bundle, Encoded, Float32, Tensors, WireHeader
from lorikit.quantization import wire
from lorikit.quantization.allocation import Choice, allocate
from lorikit.quantization.base import Codec, QuantizationError

_PLAIN = ("fp32", "fp16", "bf16")


def header_of(scheme: WireScheme, seed: int) -> WireHeader:
    """What the reader of a bundle in that scheme must know."""
    return WireHeader(
        version=scheme.version,
        scheme=scheme.codec,
        delta=scheme.delta,
        stochastic=scheme.stochastic,
        rotation_block=scheme.rotation_block,
        seed=seed,
        error_feedback=scheme.error_feedback,
        round=scheme.round,
    )


def encode(
    values: Tensors, scheme: WireScheme, header: WireHeader, importance: Mapping[str, float]
) -> dict[str, Encoded]:
    """Every tensor as the scheme has it travel.

    Args:
        values: Finite float32 tensors.
        scheme: Codec, share and budget.
        header: Rounding, rotation and seed.
        importance: Weight of each tensor's squared error; 1 where absent.

    Raises:
        QuantizationError: The budget is too small, or a value is not finite.
    """
    codecs = _codecs(values, scheme, header, importance)
    return {name: wire.encode(value, name, header, codecs[name]) for name, value in values.items()}


def difference(base: Tensors, target: Tensors) -> Tensors:
    """What has to be added to the base, by tensor; tensors that stay as they are have no entry.

    Where a shape has changed, the base counts as cut to the first part, or as zero where it has
    none; so for tensors that are new.
    """
    changes = {}
    for name, values in sorted(target.items()):
        change = values - fitted(base.get(name), values.shape)
        if change.any() or name not in base or base[name].shape != values.shape:
            changes[name] = change
    return changes


def rebuilt(base: Tensors, change: Bundle, names: Iterable[str], *, max_bytes: int) -> Tensors:
    """The adapter after a change.

    Args:
        base: The adapter that the change is against.
        change: A bundle with a header; it holds the tensors that differ.
        names: Tensors of the result.
        max_bytes: Most bytes of the result in float32; nothing larger is decoded.

    Raises:
        QuantizationError: No header, an unknown scheme, a tensor that is neither held nor sent, or
            a result that is too large.
    """
    if change.wire is None or not change.wire.delta:
        raise QuantizationError("the bundle holds no changes")
    wire.check_header(change.wire)
    sizes = [4 * math.prod(encoded.shape) for encoded in change.tensors.values()]
    if sum(sizes) > max_bytes:
        raise QuantizationError(f"a change of {sum(sizes)} bytes exceeds {max_bytes}")
    result = {}
    for name in sorted(names):
        encoded = change.tensors.get(name)
        if encoded is not None:
            decoded = wire.decode(encoded, name, change.wire)
            result[name] = fitted(base.get(name), encoded.shape) + decoded
        elif name in base:
            result[name] = base[name]
        else:
            raise QuantizationError(f"{name}: neither held nor sent")
    return result


def fitted(held: Float32 | None, shape: tuple[int, ...]) -> Float32:
    """Values cut to the first part of each axis, and zero beyond them."""
    if held is not None and held.shape == shape:
        return held
    result = np.zeros(shape, np.float32)
    if held is not None and held.ndim == len(shape):
        common = tuple(slice(min(a, b)) for a, b in zip(held.shape, shape, strict=True))
        result[common] = held[common]
    return result


def _codecs(
    values: Tensors, scheme: WireScheme, header: WireHeader, importance: Mapping[str, float]
) -> dict[str, Codec]:
    """The codec of each tensor."""
    small = {name: wire.small_codec(value) for name, value in values.items()}
    if scheme.codec in _PLAIN:
        small = dict.fromkeys(values)
    chosen = {name: each for name, each in small.items() if each is not None}
    large = {name: value for name, value in values.items() if name not in chosen}
    if scheme.codec != ADAPTIVE:
        codec = wire.scheme_codec(scheme.codec, top_share=scheme.top_share)
        return chosen | dict.fromkeys(large, codec)
    budget = scheme.budget_bytes
    for name, codec in chosen.items():
        budget -= wire.encode(values[name], name, header, codec).nbytes
    return chosen | _within_budget(large, header, importance, budget)


def _within_budget(
    values: Tensors, header: WireHeader, importance: Mapping[str, float], budget: int
) -> dict[str, Codec]:
    """The codecs of the ladder that fit the budget with the least weighted error."""
    choices = {
        name: [_choice(value, name, header, place, importance) for place in range(len(wire.LADDER))]
        for name, value in values.items()
    }
    taken = allocate(choices, budget)
    return {name: wire.LADDER[int(choice.codec)] for name, choice in taken.items()}


def _choice(
    values: Float32, name: str, header: WireHeader, place: int, importance: Mapping[str, float]
) -> Choice:
    """A place on the ladder with the bytes and the weighted squared error it really has."""
    encoded = wire.encode(values, name, header, wire.LADDER[place])
    error = (wire.decode(encoded, name, header) - values).reshape(-1)
    squared = float(np.dot(error, error))
    return Choice(
        codec=str(place),
        nbytes=encoded.nbytes,
        distortion=importance.get(name, 1.0) * squared,
    )
