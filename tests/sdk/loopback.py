# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  # RPC names live in the .proto
"""A small but real gRPC server on the loopback device, with faults to order."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc

from lorikit.proto.limits import (
    ERROR_METADATA,
    MAX_MESSAGE_BYTES,
    PROTOCOL_METADATA,
    PROTOCOL_VERSION,
    RETRY_METADATA,
    TOKEN_METADATA,
)
from lorikit.proto.manifest import digest_of
from lorikit.proto.status import STATUS, ErrorCode
from lorikit.proto.v1 import device_service_pb2 as pb
from lorikit.proto.v1 import device_service_pb2_grpc as rpc

Fault = Callable[[grpc.ServicerContext], None]


def refuse(code: ErrorCode, retry_seconds: float | None = None) -> Fault:
    """Answer with one of our codes, as the real server does."""

    def fault(context: grpc.ServicerContext) -> None:
        trailers = [(ERROR_METADATA, code.value)]
        if retry_seconds is not None:
            trailers.append((RETRY_METADATA, str(retry_seconds)))
        context.set_trailing_metadata(tuple(trailers))
        context.abort(STATUS[code].grpc_code, STATUS[code].sentence)

    return fault


def drop(status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Fault:
    """Answer as a broken network or a proxy does: a gRPC status without a code of ours."""
    return lambda context: context.abort(status, "the network is down")


class Loopback(rpc.DeviceServiceServicer):
    """Hands out what ``offers`` holds, keeps updates, and obeys the faults queued per call."""

    def __init__(self, folder: Path, credentials: grpc.ServerCredentials | None = None) -> None:
        self.folder = folder
        self.chunk_bytes = 1000
        self.offers: list[pb.NextTaskResponse] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.spoil: deque[Callable[[pb.DownloadBlobResponse], pb.DownloadBlobResponse | None]] = (
            deque()
        )
        """Per download, what becomes of its second chunk; None ends the stream there."""
        self.calls: Counter[str] = Counter()
        self.offsets: list[int] = []
        self.profiles: list[pb.Profile] = []
        self.updates: dict[str, bytes] = {}
        self.reports: list[pb.TrainingReport] = []
        self.evaluations: list[pb.ReportEvaluationRequest] = []
        self.failures: list[pb.ReportFailureRequest] = []
        self.beats: list[pb.HeartbeatRequest] = []
        self.go_on = True
        self.token = "secret"
        self.keep_upload_bytes: int | None = None
        """Break the next upload off after so many bytes, and remember those."""
        self.partial: dict[str, bytes] = {}
        self.beat_seen = threading.Event()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
        )
        rpc.add_DeviceServiceServicer_to_server(self, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Loopback:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()

    def Enrol(self, request, context):
        self._begin("Enrol", context, identified=False)
        self.profiles.append(request.profile)
        device = "device-" + request.installation_id[:6]
        return pb.EnrolResponse(device_id=device, token=self.token)

    def Heartbeat(self, request, context):
        self._begin("Heartbeat", context)
        self.beats.append(request)
        self.beat_seen.set()
        return pb.HeartbeatResponse(go_on=self.go_on, lease_seconds=0.6)

    def NextTask(self, request, context):
        self._begin("NextTask", context)
        return self.offers[0] if len(self.offers) == 1 else self._open_offer()

    def DownloadBlob(self, request, context) -> Iterator[pb.DownloadBlobResponse]:
        self._begin("DownloadBlob", context)
        path = self.folder / request.digest
        if not path.exists():
            refuse(ErrorCode.BLOB_UNKNOWN)(context)
        data = path.read_bytes()
        self.offsets.append(request.offset)
        spoil = self.spoil.popleft() if self.spoil else None
        for number, start in enumerate(range(request.offset, len(data), self.chunk_bytes)):
            message = chunk_message(data, start, self.chunk_bytes)
            if number == 1 and spoil is not None:
                spoilt = spoil(message)
                if spoilt is None:
                    return
                message = spoilt
            yield message

    def UploadStatus(self, request, context):
        self._begin("UploadStatus", context)
        held = self.partial.get(request.update_id, b"")
        return pb.UploadStatusResponse(offset=len(held), accepted=request.update_id in self.updates)

    def UploadUpdate(self, requests, context):
        self._begin("UploadUpdate", context)
        header = next(requests).header
        data = self.partial.get(header.update_id, b"")
        if header.offset != len(data):
            refuse(ErrorCode.OFFSET_INVALID)(context)
        self.offsets.append(header.offset)
        for request in requests:
            chunk = request.chunk
            assert hashlib.sha256(chunk.data).digest() == chunk.chunk_digest
            assert chunk.offset == len(data)
            data += chunk.data
            if self.keep_upload_bytes is not None:
                self.partial[header.update_id] = data[: self.keep_upload_bytes]
                self.keep_upload_bytes = None
                drop()(context)
        if len(data) != header.total_size or digest_of(data) != header.digest:
            refuse(ErrorCode.UPDATE_CORRUPT)(context)
        self.updates[header.update_id] = data
        self.reports.append(header.report)
        self._close_offer(header.task_id)
        return pb.UploadUpdateResponse(update_id=header.update_id)

    def ReportEvaluation(self, request, context):
        self._begin("ReportEvaluation", context)
        self.evaluations.append(request)
        self._close_offer(request.task_id)
        return pb.ReportEvaluationResponse()

    def ReportFailure(self, request, context):
        self._begin("ReportFailure", context)
        self.failures.append(request)
        self._close_offer(request.task_id)
        return pb.ReportFailureResponse()

    def _begin(self, name: str, context: grpc.ServicerContext, *, identified: bool = True) -> None:
        self.calls[name] += 1
        metadata = dict(context.invocation_metadata())
        if metadata.get(PROTOCOL_METADATA) != str(PROTOCOL_VERSION):
            refuse(ErrorCode.PROTOCOL_UNSUPPORTED)(context)
        if identified and metadata.get(TOKEN_METADATA) != self.token:
            refuse(ErrorCode.IDENTITY_REQUIRED)(context)
        if self.faults[name]:
            self.faults[name].popleft()(context)

    def _open_offer(self) -> pb.NextTaskResponse:
        """The first offer; one that is no task is made once."""
        offer = self.offers[0]
        if not offer.HasField("task"):
            self.offers.pop(0)
        return offer

    def _close_offer(self, task_id: str) -> None:
        self.offers = [offer for offer in self.offers if offer.task.task_id != task_id]


def chunk_message(data: bytes, start: int, size: int) -> pb.DownloadBlobResponse:
    chunk = data[start : start + size]
    return pb.DownloadBlobResponse(
        offset=start,
        data=chunk,
        chunk_digest=hashlib.sha256(chunk).digest(),
        total_size=len(data),
    )
