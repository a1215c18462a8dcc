# SPDX-License-Identifier: Apache-2.0
"""Every error code has its gRPC status and a sentence fit for the other side."""

from __future__ import annotations

import grpc
import pytest

from lorikit.proto.status import STATUS, ErrorCode

PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
}
"""Statuses whose cause can be gone by the next call."""


def test_table_has_every_code_and_no_other() -> None:
    assert set(STATUS) == set(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_code_is_named_as_it_travels(code: ErrorCode) -> None:
    assert code.value == code.name
    assert ErrorCode(str(code)) is code


@pytest.mark.parametrize("code", ErrorCode)
def test_status_is_an_error_with_one_public_sentence(code: ErrorCode) -> None:
    status = STATUS[code]

    assert status.grpc_code is not grpc.StatusCode.OK
    assert status.sentence[0].isupper()
    assert status.sentence.endswith(".")
    assert "." not in status.sentence[:-1]


@pytest.mark.parametrize("code", [code for code in ErrorCode if STATUS[code].retry])
def test_only_a_passing_status_invites_to_try_again(code: ErrorCode) -> None:
    assert STATUS[code].grpc_code in PASSING


def test_sentences_tell_codes_apart() -> None:
    assert len({status.sentence for status in STATUS.values()}) == len(ErrorCode)
