# SPDX-License-Identifier: Apache-2.0
"""An update on its way out: what has changed, in few bytes, and what is left for the next one.

Error feedback runs along a stream of updates. What an update leaves out is kept under its round,
and the plan names the last round that counted: so a device that was killed, or whose update came
too late, goes on from exactly what the server has not got yet, and never adds it twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorikit.proto.plan import WireScheme
from lorikit.proto.tensors import Encoded, Float32, Tensors, WireHeader
from lorikit.quantization import QuantizationError, changes, wire
from lorikit.sdk._errors import NonFiniteError, PlanRefusedError, StorageFullError
from lorikit.sdk._store import Residuals

logger = logging.getLogger(__name__)

FEEDBACK_DECAY = 0.9
"""Factor on what was left out, for each round that the device missed since."""

FEEDBACK_ROUNDS = 32
"""Missed rounds after which what was left out is forgotten."""


@dataclass(frozen=True, slots=True)
class WireTensors:
    """The adapter tensors of an update, ready to travel."""

    tensors: dict[str, Encoded]
    header: WireHeader
    left: Tensors
    """What the encoding left out, in the shape of what is sent, and what was carried of tensors
    that are not sent this time."""


def check_scheme(scheme: WireScheme) -> None:
    """Refuse a scheme that this SDK does not have.

    Raises:
        PlanRefusedError: The message names it.
    """
    try:
        wire.check_scheme(scheme.codec)
    except QuantizationError as error:
        raise PlanRefusedError(f"{error}; update the app") from error


def encode_with_feedback(
    tensors: Tensors,
    received: Tensors,
    scheme: WireScheme,
    residuals: Residuals | None,
    *,
    seed: int,
    importance: Mapping[str, float],
    precision: str,
) -> WireTensors:
    """The update in the scheme's form; what it leaves out is on disk when this returns.

    Repeating the call gives the same bytes and leaves the same behind.

    Args:
        tensors: Adapter tensors to send, as trained.
        received: The adapter as received.
        scheme: How they travel.
        residuals: Where earlier updates left their rest; None keeps none.
        seed: Of the plan.
        importance: Weight of each tensor's error; 1 where absent.
        precision: Of the base model; a rest from another one is dropped.

    Raises:
        NonFiniteError: A change is not finite; names the tensor.
        PlanRefusedError: The scheme cannot hold the update, for example within its budget.
    """
    owner = f"{scheme.codec}/{precision}"
    carried: Tensors = {}
    if scheme.error_feedback and residuals is not None:
        carried = _carried(residuals, scheme, owner)
    encoded = encode_tensors(
        tensors, received, scheme, seed=seed, importance=importance, carried=carried
    )
    if scheme.error_feedback and residuals is not None:
        try:
            residuals.save(
                scheme.stream,
                scheme.round,
                encoded.left,
                owner=owner,
                spared=scheme.counted_round,
            )
        except StorageFullError as error:
            logger.warning("what the update leaves out is lost: %s", error)
    return encoded


def encode_tensors(
    tensors: Tensors,
    received: Tensors,
    scheme: WireScheme,
    *,
    seed: int,
    importance: Mapping[str, float],
    carried: Tensors,
) -> WireTensors:
    """The update in the scheme's form, as a function of its arguments alone.

    Args:
        tensors: Adapter tensors to send, as trained.
        received: The adapter as received; a tensor that has become shorter since (its rank was
            pruned) is compared with the first part.
        scheme: How they travel.
        seed: Of the plan.
        importance: Weight of each tensor's error; 1 where absent.
        carried: What is added before encoding, by name; ignored where the shape differs.

    Raises:
        NonFiniteError: A change is not finite; names the tensor.
        PlanRefusedError: The budget is too small.
    """
    header = changes.header_of(scheme, seed)
    values = {
        name: _sent_values(name, tensor, received, scheme, carried)
        for name, tensor in sorted(tensors.items())
    }
    try:
        encoded = changes.encode(values, scheme, header, importance)
    except QuantizationError as error:
        raise PlanRefusedError(f"wire.budget_bytes: {error}") from error
    left = {name: rest for name, rest in carried.items() if name not in values}
    left |= {name: values[name] - wire.decode(encoded[name], name, header) for name in values}
    return WireTensors(encoded, header, left)


def _carried(residuals: Residuals, scheme: WireScheme, owner: str) -> Tensors:
    """What the last counted update left out, faded by the rounds missed since."""
    if scheme.counted_round is None:
        return {}
    missed = scheme.round - scheme.counted_round - 1
    if missed > FEEDBACK_ROUNDS:
        return {}
    saved = residuals.load(scheme.stream, scheme.counted_round, owner=owner)
    if saved is None:
        logger.warning(
            "error feedback starts anew: nothing is kept of round=%d", scheme.counted_round
        )
        return {}
    fading = np.float32(FEEDBACK_DECAY**missed)
    return {name: values * fading for name, values in saved.items()}


def _sent_values(
    name: str, tensor: Float32, received: Tensors, scheme: WireScheme, carried: Tensors
) -> Float32:
    values = tensor
    if scheme.delta:
        values = tensor - received[name][tuple(slice(length) for length in tensor.shape)]
    rest = carried.get(name)
    if rest is not None and rest.shape == values.shape:
        values = values + rest
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{name}: its change is not finite; lower the learning rate or clip")
    return values
