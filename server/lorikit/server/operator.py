# SPDX-License-Identifier: Apache-2.0
"""The gRPC face towards operators: decode, call, encode."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc

from lorikit.proto.limits import CHUNK_BYTES
from lorikit.proto.status import ErrorCode
from lorikit.proto.v1 import operator_service_pb2 as messages
from lorikit.proto.v1.operator_service_pb2_grpc import (
    OperatorServiceServicer,
    add_OperatorServiceServicer_to_server,
)
from lorikit.server.config import RunConfig, parse_run_config
from lorikit.server.errors import RequestError
from lorikit.server.identity.enrolment import Registry
from lorikit.server.offload import Offload
from lorikit.server.runs import Runs, Summary

_MAX_REASON = 200
_LAST_SEQUENCE = (1 << 63) - 1
"""Largest number that the database can hold."""

Context = grpc.aio.ServicerContext[Any, Any]


class OperatorService(OperatorServiceServicer):
    """What operators may ask for."""

    def __init__(self, runs: Runs, offload: Offload, *, registry: Registry | None = None) -> None:
        """Bind the parts; without a registry there are no identities to administer."""
        self._runs = runs
        self._offload = offload
        self._registry = registry

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let the server answer these calls."""
        add_OperatorServiceServicer_to_server(self, server)

    async def CreateRun(
        self, request: messages.CreateRunRequest, context: Context
    ) -> messages.RunSummary:
        config = _config(request.name, request.config_json)
        return _summary(await self._runs.create(config))

    async def ListRuns(
        self, request: messages.ListRunsRequest, context: Context
    ) -> messages.ListRunsResponse:
        runs = await self._runs.every()
        return messages.ListRunsResponse(runs=[_summary(run) for run in runs])

    async def GetRun(self, request: messages.GetRunRequest, context: Context) -> messages.RunReport:
        summary = await self._runs.summary(request.run_id)
        report = await self._runs.report(summary.run_id)
        return messages.RunReport(summary=_summary(summary), report_json=json.dumps(report))

    async def WatchRun(
        self, request: messages.WatchRunRequest, context: Context
    ) -> AsyncIterator[messages.RunEvent]:
        async for event in self._runs.watch(
            request.run_id, min(request.from_sequence, _LAST_SEQUENCE)
        ):
            yield messages.RunEvent(
                sequence=event.sequence,
                time=event.time,
                kind=event.kind,
                facts_json=event.facts,
            )

    async def StopRun(
        self, request: messages.StopRunRequest, context: Context
    ) -> messages.RunSummary:
        return _summary(await self._runs.stop(request.run_id, at_once=request.at_once))

    async def ListAdapters(
        self, request: messages.ListAdaptersRequest, context: Context
    ) -> messages.ListAdaptersResponse:
        return messages.ListAdaptersResponse(names=list(await self._runs.adapters(request.run_id)))

    async def FetchAdapter(
        self, request: messages.FetchAdapterRequest, context: Context
    ) -> AsyncIterator[messages.FileChunk]:
        for path in await self._runs.adapter_files(request.run_id, request.name):
            chunks = _file_chunks(path)
            while (chunk := await self._offload.file(next, chunks, None)) is not None:
                yield chunk

    async def IssueToken(
        self, request: messages.IssueTokenRequest, context: Context
    ) -> messages.IssueTokenResponse:
        token = await self._offload.database(
            self._authority().issue_token, valid_seconds=request.valid_seconds, now=time.time()
        )
        return messages.IssueTokenResponse(token=token)

    async def RevokeIdentity(
        self, request: messages.RevokeIdentityRequest, context: Context
    ) -> messages.RevokeIdentityResponse:
        revoked = await self._offload.database(
            self._authority().revoke, request.subject, reason=request.reason[:_MAX_REASON]
        )
        return messages.RevokeIdentityResponse(revoked=revoked)

    def _authority(self) -> Registry:
        if self._registry is None:
            raise RequestError(ErrorCode.REQUEST_INVALID, "this server issues no certificates")
        return self._registry


def _config(name: str, text: str) -> RunConfig:
    """Settings of a run that is created under a name."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(ErrorCode.CONFIG_INVALID, f"settings are not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(ErrorCode.CONFIG_INVALID, "settings are not a JSON object")
    return parse_run_config(json.dumps({**fields, "name": name or fields.get("name", "")}))


def _summary(summary: Summary) -> messages.RunSummary:
    return messages.RunSummary(
        run_id=summary.run_id,
        name=summary.name,
        method=summary.method,
        state=summary.state,
        round=summary.round,
        rounds=summary.rounds,
        metric=summary.metric,
        message=summary.message,
    )


def _file_chunks(path: Path) -> Iterator[messages.FileChunk]:
    """The file in chunks; the last one has the digest of the whole."""
    total = path.stat().st_size
    offset, whole = 0, hashlib.sha256()
    with path.open("rb") as file:
        while True:
            data = file.read(CHUNK_BYTES)
            whole.update(data)
            is_last = offset + len(data) >= total or not data
            yield messages.FileChunk(
                file=path.name,
                offset=offset,
                data=data,
                total_size=total,
                digest=whole.hexdigest() if is_last else "",
            )
            offset += len(data)
            if is_last:
                return
