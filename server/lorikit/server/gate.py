# SPDX-License-Identifier: Apache-2.0
"""What every call passes before its handler: protocol version, identity, and errors on the way out.

The version is looked at first, before the message is even parsed. This is the one place where
errors become statuses.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

import grpc
from sqlalchemy.exc import OperationalError

from lorikit.proto.limits import (
    DEVICE_METADATA,
    ERROR_METADATA,
    PROTOCOL_METADATA,
    PROTOCOL_VERSION,
    RETRY_METADATA,
    TOKEN_METADATA,
)
from lorikit.proto.status import STATUS, ErrorCode
from lorikit.server.errors import RequestError

logger = logging.getLogger(__name__)

_OURS = "/lorikit.proto.v1."
_DEVICE = f"{_OURS}DeviceService/"
_ENROL = f"{_DEVICE}Enrol"
_MAX_DETAIL = 1000
_AT_LIMITS = (ErrorCode.SERVER_BUSY, ErrorCode.SERVER_STOPPING, ErrorCode.STORAGE_FULL)

CALLER: ContextVar[str] = ContextVar("caller")
"""Device that makes the current call; set for every call of the device service but Enrol."""

Authenticate = Callable[[str, str], Awaitable[None]]
"""Checks a device id and its secret; raises ``RequestError``."""

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Any
"""An RPC method handler; grpcio's type stubs know its synchronous form only."""


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler, or turns it away with a code."""

    def __init__(
        self,
        authenticate: Authenticate,
        is_stopping: Callable[[], bool],
        *,
        retry_seconds: float = 5.0,
    ) -> None:
        """Bind the parts.

        Args:
            authenticate: How devices are known.
            is_stopping: Whether the server is shutting down.
            retry_seconds: When to come back to a server that is at its limits, unless the error
                says so itself.
        """
        self._authenticate = authenticate
        self._is_stopping = is_stopping
        self._retry_seconds = retry_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The handler of the call, guarded; health and reflection pass as they are."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith(_OURS):
            return handler
        metadata = {key: value for key, value in handler_call_details.invocation_metadata or ()}
        try:
            _check_version(metadata)
            if self._is_stopping():
                raise RequestError(ErrorCode.SERVER_STOPPING)
        except RequestError as error:
            return self._refusing(handler, error)
        return self._guarded(handler, method, metadata)

    async def _admit(self, method: str, metadata: Mapping[str, str | bytes]) -> None:
        if not method.startswith(_DEVICE) or method == _ENROL:
            return
        device = str(metadata.get(DEVICE_METADATA, ""))
        if not device:
            raise RequestError(ErrorCode.IDENTITY_REQUIRED, f"no {DEVICE_METADATA} in metadata")
        await self._authenticate(device, str(metadata.get(TOKEN_METADATA, "")))
        CALLER.set(device)

    def _guarded(
        self,
        handler: Handler,
        method: str,
        metadata: Mapping[str, str | bytes],
    ) -> Handler:
        async def answer(request: object, context: Context) -> object:
            try:
                await self._admit(method, metadata)
                return await (handler.stream_unary or handler.unary_unary)(request, context)
            except Exception as error:  # becomes a status, whatever it is
                await self._abort(context, method, error)

        async def stream(request: object, context: Context) -> AsyncIterator[object]:
            try:
                await self._admit(method, metadata)
                async for item in handler.unary_stream(request, context):
                    yield item
            except Exception as error:  # becomes a status, whatever it is
                await self._abort(context, method, error)

        return _like(handler, answer, stream, handler.request_deserializer)

    def _refusing(self, handler: Handler, error: RequestError) -> Handler:
        """A handler that turns the call away without parsing what it carries."""

        async def answer(_: object, context: Context) -> object:
            await self._abort(context, "", error)

        async def stream(_: object, context: Context) -> AsyncIterator[object]:
            await self._abort(context, "", error)
            yield  # makes this an asynchronous generator

        return _like(handler, answer, stream, None)

    async def _abort(self, context: Context, method: str, error: Exception) -> NoReturn:
        refusal = as_request_error(error)
        if refusal.code is ErrorCode.INTERNAL:
            logger.error("call failed method=%s", method, exc_info=error)
        else:
            logger.debug("call refused method=%s: %s", method, refusal)
        status = STATUS[refusal.code]
        trailing = [(ERROR_METADATA, refusal.code.value)]
        seconds = refusal.retry_seconds
        if seconds is None and refusal.code in _AT_LIMITS:
            seconds = self._retry_seconds
        if seconds is not None:
            trailing.append((RETRY_METADATA, f"{seconds:g}"))
        details = f"{status.sentence} {refusal.detail}".strip()[:_MAX_DETAIL]
        await context.abort(status.grpc_code, details, tuple(trailing))
        raise AssertionError("abort returned")


def _check_version(metadata: Mapping[str, str | bytes]) -> None:
    given = metadata.get(PROTOCOL_METADATA)
    if given != str(PROTOCOL_VERSION):
        raise RequestError(
            ErrorCode.PROTOCOL_UNSUPPORTED,
            f"caller speaks version {given!r:.40}, this server speaks {PROTOCOL_VERSION}",
        )


def _like(
    handler: Handler,
    answer: Callable[[Any, Context], Awaitable[object]],
    stream: Callable[[Any, Context], AsyncIterator[object]],
    deserializer: Callable[[bytes], Any] | None,
) -> Handler:
    """A handler of the same kind with another behaviour."""
    serializer = handler.response_serializer
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, deserializer, serializer)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(answer, deserializer, serializer)
    return grpc.unary_unary_rpc_method_handler(answer, deserializer, serializer)


def as_request_error(error: Exception) -> RequestError:
    """The refusal that stands for any error; what nobody foresaw gets no details."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RequestError(ErrorCode.STORAGE_FULL)
    if isinstance(error, OperationalError):
        return RequestError(ErrorCode.SERVER_BUSY)
    return RequestError(ErrorCode.INTERNAL)
