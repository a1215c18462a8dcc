# SPDX-License-Identifier: Apache-2.0
"""Who a certificate stands for: a device or an operator, and what it may do.

A subject is written ``device:ID`` or ``operator:NAME``; a certificate carries it as the URI
``urn:lorikit:device:ID``.
"""

from __future__ import annotations

import re
from enum import StrEnum

_URN = "urn:lorikit:"
_SUBJECT = re.compile(r"device:[0-9a-f]{1,64}|operator:[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Role(StrEnum):
    """What a certificate allows; each operator's role includes the ones before it."""

    DEVICE = "device"
    """Take part: the device service, as this one device."""
    VIEWER = "viewer"
    """See runs and their reports."""
    OPERATOR = "operator"
    """Create and stop runs, fetch adapters."""
    ADMIN = "admin"
    """Let devices in and cut anybody off."""

    def includes(self, wanted: Role) -> bool:
        """Whether this role may do what ``wanted`` may."""
        if Role.DEVICE in (self, wanted):
            return self is wanted
        order = (Role.VIEWER, Role.OPERATOR, Role.ADMIN)
        return order.index(self) >= order.index(wanted)


OPERATOR_ROLES = (Role.VIEWER, Role.OPERATOR, Role.ADMIN)
"""Roles of the operator service, the least first."""


def is_subject(text: str) -> bool:
    """Whether the text names a device or an operator."""
    return _SUBJECT.fullmatch(text) is not None


def device_subject(device_id: str) -> str:
    """The subject of a device."""
    return f"device:{device_id}"


def operator_subject(name: str) -> str:
    """The subject of an operator."""
    return f"operator:{name}"


def to_uri(subject: str) -> str:
    """The subject as a certificate carries it."""
    return _URN + subject


def from_uri(uri: str) -> str | None:
    """The subject that a certificate carries; None where it carries none of ours."""
    subject = uri.removeprefix(_URN)
    return subject if uri.startswith(_URN) and is_subject(subject) else None
