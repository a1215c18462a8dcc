# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  # RPC names live in the .proto
"""Stands between devices and a server, and does to their messages what it is told to.

It passes every call on as it is, errors and metadata included, over two real connections. A hook
may change a message, hold it back until it is let go, or end a stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from tests.integration.processes import PATIENCE_SECONDS

from lorikit.proto.limits import MAX_MESSAGE_BYTES
from lorikit.proto.v1 import device_service_pb2 as pb
from lorikit.proto.v1 import device_service_pb2_grpc as rpc

Metadata = list[tuple[str, str]]
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


class CutOffError(Exception):
    """Raised by a hook: the stream ends here without an error, as if all had been said."""


class Gate:
    """Something that is held back until it is opened."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._open = threading.Event()

    def hold(self) -> None:
        """For a hook: wait here."""
        self._reached.set()
        assert self._open.wait(PATIENCE_SECONDS), "nobody opened the gate"

    def wait_until_reached(self) -> None:
        """For a test: wait until somebody stands at the gate."""
        assert self._reached.wait(PATIENCE_SECONDS), "nobody came to the gate"

    def open(self) -> None:
        self._open.set()


class Relay(rpc.DeviceServiceServicer):
    """Hooks get a message and return what goes on; by default that is the message itself."""

    def __init__(self, target: str) -> None:
        self.metadata: Callable[[Metadata], Metadata] = lambda metadata: metadata
        self.offer: Callable[[pb.NextTaskResponse], pb.NextTaskResponse] = lambda reply: reply
        self.chunk: Callable[[pb.DownloadBlobResponse], pb.DownloadBlobResponse] = lambda m: m
        self.sent: Callable[[pb.UploadUpdateRequest], pb.UploadUpdateRequest] = lambda m: m
        self.receipt: Callable[[pb.UploadUpdateResponse], pb.UploadUpdateResponse] = lambda m: m
        self._channel = grpc.insecure_channel(target, _OPTIONS)
        self._stub = rpc.DeviceServiceStub(self._channel)
        self._server = grpc.server(futures.ThreadPoolExecutor(32), options=_OPTIONS)
        rpc.add_DeviceServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Relay:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._server.stop(grace=None).wait()

    def Enrol(self, request, context):
        return self._pass("Enrol", request, context)

    def Heartbeat(self, request, context):
        return self._pass("Heartbeat", request, context)

    def NextTask(self, request, context):
        return self.offer(self._pass("NextTask", request, context))

    def UploadStatus(self, request, context):
        return self._pass("UploadStatus", request, context)

    def ReportEvaluation(self, request, context):
        return self._pass("ReportEvaluation", request, context)

    def ReportFailure(self, request, context):
        return self._pass("ReportFailure", request, context)

    def DownloadBlob(self, request, context) -> Iterator[pb.DownloadBlobResponse]:
        try:
            for message in self._pass("DownloadBlob", request, context):
                yield self.chunk(message)
        except CutOffError:
            return
        except grpc.RpcError as error:
            _fail(context, error)

    def UploadUpdate(self, requests, context):
        def messages() -> Iterator[pb.UploadUpdateRequest]:
            try:
                for message in requests:
                    yield self.sent(message)
            except CutOffError:
                return

        return self.receipt(self._pass("UploadUpdate", messages(), context))

    def _pass(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        """The server's answer; a caller that goes away takes its call along."""
        given = [(m.key, m.value) for m in context.invocation_metadata()]
        ours = self.metadata([(key, value) for key, value in given if key.startswith("lorikit-")])
        call = getattr(self._stub, method)
        call = call if method == "DownloadBlob" else call.future
        answer = call(request, metadata=ours, timeout=context.time_remaining())
        context.add_callback(answer.cancel)
        if method == "DownloadBlob":
            return answer
        try:
            return answer.result()
        except grpc.RpcError as error:
            _fail(context, error)
        except grpc.FutureCancelledError:
            context.abort(grpc.StatusCode.CANCELLED, "the caller went away")


def _fail(context: grpc.ServicerContext, error: grpc.RpcError) -> None:
    assert isinstance(error, grpc.Call)
    ours = [(key, value) for key, value in error.trailing_metadata() or () if "lorikit" in key]
    context.set_trailing_metadata(tuple(ours))
    context.abort(error.code(), error.details() or "")
