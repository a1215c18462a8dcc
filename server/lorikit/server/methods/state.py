# SPDX-License-Identifier: Apache-2.0
"""A method's state as bytes, for the store between rounds.

The bytes are a safetensors file: the arrays under their own names, and everything else as JSON in
one more tensor. Equal states give equal bytes.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lorikit.server.methods.base import State

STATE_FORMAT = 1
"""Format that this version writes and reads."""

_REST = "__state__"


def pack_state(state: State) -> bytes:
    """Serialise a state; ``unpack_state`` gives it back bit for bit.

    Raises:
        ValueError: A tensor has the name that is reserved for the rest, a number is not finite, or
            ``extra`` holds something JSON cannot.
    """
    if _REST in state.tensors:
        raise ValueError(f"{_REST!r} is reserved; rename that tensor")
    rest = {
        "format": STATE_FORMAT,
        "scalars": dict(state.scalars),
        "devices": {device: dict(memory) for device, memory in state.devices.items()},
        "extra": dict(state.extra),
    }
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state does not fit JSON: {error}") from error
    arrays = {
        name: np.asarray(array, dtype="<f4", order="C") for name, array in state.tensors.items()
    }
    return save({**arrays, _REST: np.frombuffer(text.encode(), dtype=np.uint8)})


def unpack_state(data: bytes) -> State:
    """The state in bytes from ``pack_state``.

    Raises:
        ValueError: The bytes are not a state, or one of another format.
    """
    try:
        tensors = load(data)
        rest = json.loads(tensors.pop(_REST).tobytes())
        written = rest["format"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError("bytes are not the state of a method") from error
    if written != STATE_FORMAT:
        raise ValueError(f"state format {written} is not {STATE_FORMAT}; use the server it is from")
    return State(
        tensors=tensors, scalars=rest["scalars"], devices=rest["devices"], extra=rest["extra"]
    )
