# SPDX-License-Identifier: Apache-2.0
"""Which calls the audit log tells of, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorikit.server.identity.admission import Call
from lorikit.server.identity.subjects import device_subject
from lorikit.server.store.identity import AuditLine

_Subject = Callable[[Any, Any], str]
"""What a call was about, from its request and its answer."""

_DEEDS: Mapping[str, tuple[str, _Subject]] = {
    "Enrol": ("enrol", lambda request, reply: device_subject(reply.device_id)),
    "RenewCertificate": ("renew", lambda request, reply: ""),
    "DownloadBlob": ("fetch", lambda request, reply: f"blob:{request.digest}"),
    "UploadUpdate": ("train", lambda request, reply: f"update:{reply.update_id}"),
    "ReportEvaluation": ("evaluate", lambda request, reply: f"task:{request.task_id}"),
    "ReportFailure": (
        "fail",
        lambda request, reply: f"task:{request.task_id} error:{request.error}",
    ),
    "CreateRun": ("create-run", lambda request, reply: f"run:{reply.name}"),
    "StopRun": ("stop-run", lambda request, reply: f"run:{reply.name}"),
    "FetchAdapter": (
        "fetch-adapter",
        lambda request, reply: f"run:{request.run_id} adapter:{request.name}",
    ),
    "IssueToken": ("issue-token", lambda request, reply: ""),
    "RevokeIdentity": ("revoke", lambda request, reply: request.subject),
}
"""Calls that change something, or let something out; looking at runs is no deed."""

_FROM_THE_START = ("DownloadBlob", "FetchAdapter")


def starts_with_line(call: Call) -> bool:
    """Whether the line is written before the first byte leaves."""
    return call.name in _FROM_THE_START


def done_line(call: Call, actor: str, request: object, reply: object) -> AuditLine | None:
    """The line about a call that was served; None where the log does not tell of it."""
    if call.name not in _DEEDS:
        return None
    action, subject = _DEEDS[call.name]
    return AuditLine(actor=actor, action=action, subject=subject(request, reply))
