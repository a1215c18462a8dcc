# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from lorikit.server.methods.base import State
from lorikit.server.methods.state import pack_state, unpack_state

STATE = State(
    tensors={
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "a": np.array(-0.0, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    },
    scalars={"x": 0.1, "y": 3.0},
    devices={"d": {"rank": 5.0}, "é": {}},
    extra={"list": [1, "two", None], "nested": {"flag": True}},
)


def test_a_state_comes_back_bit_for_bit() -> None:
    back = unpack_state(pack_state(STATE))

    assert back.tensors.keys() == STATE.tensors.keys()
    for name, values in STATE.tensors.items():
        assert back.tensors[name].dtype == np.float32
        assert back.tensors[name].shape == values.shape
        assert back.tensors[name].tobytes() == values.tobytes()
    assert (back.scalars, back.devices, back.extra) == (STATE.scalars, STATE.devices, STATE.extra)


def test_equal_states_give_equal_bytes() -> None:
    other = State(
        tensors=dict(reversed(list(STATE.tensors.items()))),
        scalars={"y": 3.0, "x": 0.1},
        devices=STATE.devices,
        extra=STATE.extra,
    )

    assert pack_state(other) == pack_state(STATE)


@pytest.mark.parametrize(
    "state",
    [
        State(tensors={}, scalars={"x": float("nan")}),
        State(tensors={}, extra={"x": object()}),
        State(tensors={"__state__": np.zeros(1, np.float32)}),
    ],
)
def test_what_cannot_be_stored_is_refused(state: State) -> None:
    with pytest.raises(ValueError, match=r"JSON|reserved"):
        pack_state(state)


@pytest.mark.parametrize("data", [b"", b"no", pack_state(STATE)[:-3]])
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not the state of a method"):
        unpack_state(data)


def test_a_newer_format_is_refused() -> None:
    data = pack_state(State(tensors={})).replace(b'"format":1', b'"format":2')

    with pytest.raises(ValueError, match="state format 2 is not 1"):
        unpack_state(data)
