# SPDX-License-Identifier: Apache-2.0
"""The gRPC face towards devices: decode, call, encode."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from lorikit.proto.status import ErrorCode
from lorikit.proto.v1 import device_service_pb2 as messages
from lorikit.proto.v1 import plan_pb2
from lorikit.proto.v1.device_service_pb2_grpc import (
    DeviceServiceServicer,
    add_DeviceServiceServicer_to_server,
)
from lorikit.proto.wire import blob_to_message, profile_from_message, report_from_message
from lorikit.server.downlink import change_from_json
from lorikit.server.downloads import Downloads
from lorikit.server.errors import RequestError
from lorikit.server.gate import CALLER, WHO
from lorikit.server.identity.enrolment import Registry
from lorikit.server.identity.subjects import Role
from lorikit.server.offload import Offload
from lorikit.server.patience import Patience
from lorikit.server.tasks import (
    Answer,
    Ended,
    Offer,
    Pause,
    Progress,
    Refused,
    TaskBoard,
    check_profile,
    check_report,
    device_of,
)
from lorikit.server.texts import plain
from lorikit.server.uploads import Chunk, Header, Uploads

_MAX_STATE = 40

Context = grpc.aio.ServicerContext[Any, Any]


class DeviceService(DeviceServiceServicer):
    """What devices may ask for."""

    def __init__(
        self,
        board: TaskBoard,
        uploads: Uploads,
        downloads: Downloads,
        *,
        lease_seconds: float,
        patience: Patience,
        offload: Offload,
        registry: Registry | None = None,
    ) -> None:
        """Bind the parts; without a registry, devices are known by secrets."""
        self._board = board
        self._uploads = uploads
        self._downloads = downloads
        self._lease_seconds = lease_seconds
        self._patience = patience
        self._offload = offload
        self._registry = registry

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let the server answer these calls."""
        add_DeviceServiceServicer_to_server(self, server)

    async def Enrol(
        self, request: messages.EnrolRequest, context: Context
    ) -> messages.EnrolResponse:
        profile = profile_from_message(request.profile)
        check_profile(profile)
        if self._registry is None:
            device_id, token = await self._board.enrol(request.installation_id, profile)
            return messages.EnrolResponse(device_id=device_id, token=token)
        certificate = await self._offload.database(
            self._registry.enrol,
            device_of(request.installation_id),
            installation_id=request.installation_id,
            token=request.enrolment_token,
            signing_request=request.signing_request,
        )
        device_id, _ = await self._board.enrol(request.installation_id, profile, with_token=False)
        return messages.EnrolResponse(
            device_id=device_id,
            certificate=certificate,
            package_key=self._registry.authority.package_key,
        )

    async def RenewCertificate(
        self, request: messages.RenewCertificateRequest, context: Context
    ) -> messages.RenewCertificateResponse:
        registry = self._authority()
        certificate = await self._offload.database(
            registry.renew,
            WHO.get().subject,
            role=Role.DEVICE,
            signing_request=request.signing_request,
        )
        return messages.RenewCertificateResponse(certificate=certificate)

    async def CheckCertificate(
        self, request: messages.CheckCertificateRequest, context: Context
    ) -> messages.CheckCertificateResponse:
        await self._offload.database(self._authority().check, request.certificate)
        return messages.CheckCertificateResponse()

    async def Heartbeat(
        self, request: messages.HeartbeatRequest, context: Context
    ) -> messages.HeartbeatResponse:
        progress = Progress(plain(request.state, _MAX_STATE), request.step, request.steps)
        go_on = await self._board.heartbeat(CALLER.get(), request.task_id, progress)
        return messages.HeartbeatResponse(go_on=go_on, lease_seconds=self._lease_seconds)

    async def NextTask(
        self, request: messages.NextTaskRequest, context: Context
    ) -> messages.NextTaskResponse:
        profile = profile_from_message(request.profile) if request.HasField("profile") else None
        answer = await self._board.next_task(
            CALLER.get(), wait_seconds=request.wait_seconds, profile=profile
        )
        return _answer(answer, self._sign)

    async def DownloadBlob(
        self, request: messages.DownloadBlobRequest, context: Context
    ) -> AsyncIterator[messages.DownloadBlobResponse]:
        chunks = self._downloads.chunks(CALLER.get(), request.digest, request.offset)
        async for chunk in chunks:
            yield messages.DownloadBlobResponse(
                offset=chunk.offset,
                data=chunk.data,
                chunk_digest=chunk.digest,
                total_size=chunk.total_size,
            )

    async def UploadStatus(
        self, request: messages.UploadStatusRequest, context: Context
    ) -> messages.UploadStatusResponse:
        offset, accepted = await self._uploads.status(
            CALLER.get(), request.task_id, request.update_id, request.digest
        )
        return messages.UploadStatusResponse(offset=offset, accepted=accepted)

    async def UploadUpdate(
        self, request: AsyncIterator[messages.UploadUpdateRequest], context: Context
    ) -> messages.UploadUpdateResponse:
        stream = self._patience.watch(request)
        header = await _header(stream)
        stream.expect(header.total_size)
        duplicate = await self._uploads.receive(CALLER.get(), header, _chunks(stream))
        return messages.UploadUpdateResponse(update_id=header.update_id, duplicate=duplicate)

    async def ReportEvaluation(
        self, request: messages.ReportEvaluationRequest, context: Context
    ) -> messages.ReportEvaluationResponse:
        await self._board.evaluated(
            CALLER.get(),
            request.task_id,
            metrics=dict(request.metrics),
            examples=request.examples,
        )
        return messages.ReportEvaluationResponse()

    async def ReportFailure(
        self, request: messages.ReportFailureRequest, context: Context
    ) -> messages.ReportFailureResponse:
        await self._board.fail(
            CALLER.get(), request.task_id, error=request.error, message=request.message
        )
        return messages.ReportFailureResponse()

    def _authority(self) -> Registry:
        if self._registry is None:
            raise RequestError(ErrorCode.REQUEST_INVALID, "this server issues no certificates")
        return self._registry

    def _sign(self, package_digest: str) -> bytes:
        """Signature of a package; empty where nothing is signed."""
        registry = self._registry
        return b"" if registry is None else registry.authority.sign_package(package_digest)


async def _header(stream: AsyncIterator[messages.UploadUpdateRequest]) -> Header:
    first = await anext(stream, None)
    if first is None or first.WhichOneof("message") != "header":
        raise RequestError(ErrorCode.REQUEST_INVALID, "an upload starts with its header")
    header = first.header
    report = report_from_message(header.report)
    check_report(report)
    return Header(
        task_id=header.task_id,
        update_id=header.update_id,
        digest=header.digest,
        total_size=header.total_size,
        offset=header.offset,
        report=report,
    )


async def _chunks(stream: AsyncIterator[messages.UploadUpdateRequest]) -> AsyncIterator[Chunk]:
    async for message in stream:
        if message.WhichOneof("message") != "chunk":
            raise RequestError(ErrorCode.REQUEST_INVALID, "an upload goes on with chunks")
        yield Chunk(message.chunk.offset, message.chunk.data, message.chunk.chunk_digest)


def _answer(answer: Answer, sign: Callable[[str], bytes]) -> messages.NextTaskResponse:
    match answer:
        case Offer():
            return messages.NextTaskResponse(task=_task(answer, sign))
        case Pause():
            window = messages.RetryWindow(
                min_seconds=answer.min_seconds, max_seconds=answer.max_seconds
            )
            return messages.NextTaskResponse(wait=window)
        case Refused():
            refusal = messages.Refusal(reason=answer.reason, remedy=answer.remedy)
            return messages.NextTaskResponse(refused=refusal)
        case Ended():
            return messages.NextTaskResponse(finished=_finished(answer, sign))


def _task(offer: Offer, sign: Callable[[str], bytes]) -> messages.Task:
    task = offer.task
    change = change_from_json(task.change)
    return messages.Task(
        task_id=task.id,
        run_id=task.run_id,
        round=task.round,
        lease_seconds=offer.lease_seconds,
        plan=plan_pb2.Plan.FromString(task.plan),
        package=messages.BlobRef(digest=task.package_digest, size=task.package_size),
        adapter=messages.BlobRef(digest=task.adapter_digest, size=task.adapter_size),
        kind=task.kind,
        update_id=task.update_id,
        package_signature=sign(task.package_digest),
        change=None
        if change is None
        else messages.AdapterChange(
            base=blob_to_message(change.base), blob=blob_to_message(change.blob)
        ),
    )


def _finished(ended: Ended, sign: Callable[[str], bytes]) -> messages.Finished:
    member = ended.member
    finished = messages.Finished(
        run_id=member.run_id,
        inputs=json.loads(member.inputs),
        max_length=member.max_length,
    )
    if member.package_digest is not None and member.adapter_digest is not None:
        finished.package.digest = member.package_digest
        finished.package.size = member.package_size or 0
        finished.package_signature = sign(member.package_digest)
        finished.adapter.digest = member.adapter_digest
        finished.adapter.size = member.adapter_size or 0
    return finished
