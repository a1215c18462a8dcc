# SPDX-License-Identifier: Apache-2.0
"""What every call passes: protocol version, rate, identity, audit log, and errors on the way out.

The version is looked at first, before the message is even parsed. This is the one place where
errors become statuses, and where refusals are written to the audit log.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from sqlalchemy.exc import OperationalError

from lorikit.proto.limits import (
    ERROR_METADATA,
    PROTOCOL_METADATA,
    PROTOCOL_VERSION,
    RETRY_METADATA,
)
from lorikit.proto.status import STATUS, ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.identity.admission import Admission, Call, Caller, Context, Metadata
from lorikit.server.identity.audit import AuditLog
from lorikit.server.identity.deeds import done_line, starts_with_line
from lorikit.server.identity.rates import RateLimiter
from lorikit.server.store.identity import AuditLine

logger = logging.getLogger(__name__)

_OURS = "/lorikit.proto.v1."
_MAX_DETAIL = 1000
_AT_LIMITS = (ErrorCode.SERVER_BUSY, ErrorCode.SERVER_STOPPING, ErrorCode.STORAGE_FULL)
_UNAUDITED = (*_AT_LIMITS, ErrorCode.INTERNAL)
"""Refusals that say something of the server and nothing of the caller."""

CALLER: ContextVar[str] = ContextVar("caller")
"""Device that makes the current call; set for every call of the device service but Enrol."""

WHO: ContextVar[Caller] = ContextVar("who")
"""Who makes the current call."""

Handler = Any
"""An RPC method handler; grpcio's type stubs know its synchronous form only."""

Parse = Callable[[bytes], Any]
"""Bytes to a message; raises ``DecodeError``."""


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler, or turns it away with a code."""

    def __init__(
        self,
        admission: Admission,
        audit: AuditLog,
        rates: RateLimiter,
        is_stopping: Callable[[], bool],
        *,
        retry_seconds: float,
        stall_seconds: float,
    ) -> None:
        """Bind the parts.

        Args:
            admission: How callers are known.
            audit: Where refusals and deeds are written.
            rates: How often a caller may call.
            is_stopping: Whether the server is shutting down.
            retry_seconds: When to come back to a server that is at its limits, unless the error
                says so itself.
            stall_seconds: Longest time a caller may take to accept a message.
        """
        self._admission = admission
        self._audit = audit
        self._rates = rates
        self._is_stopping = is_stopping
        self._retry_seconds = retry_seconds
        self._stall_seconds = stall_seconds

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
        service, _, name = method.removeprefix(_OURS).partition("/")
        call = Call(service=service, name=name)
        metadata = {key: value for key, value in handler_call_details.invocation_metadata or ()}
        try:
            _check_version(metadata)
            if self._is_stopping():
                raise RequestError(ErrorCode.SERVER_STOPPING)
        except RequestError as error:
            return self._refusing(handler, call, metadata, error)
        return self._guarded(handler, call, metadata)

    async def _admit(self, call: Call, metadata: Metadata, context: Context) -> Caller:
        caller = self._admission.identify(metadata, context)
        wait = self._rates.wait_seconds(caller.rate_key)
        if wait > 0:
            raise RequestError(ErrorCode.RATE_LIMITED, retry_seconds=wait)
        caller = await self._admission.admit(call, caller, metadata)
        CALLER.set(caller.device_id)
        WHO.set(caller)
        return caller

    def _guarded(self, handler: Handler, call: Call, metadata: Metadata) -> Handler:
        async def answer(request: object, context: Context) -> object:
            try:
                caller = await self._admit(call, metadata, context)
                request = _parsed(request, handler.request_deserializer)
                reply = await (handler.stream_unary or handler.unary_unary)(request, context)
                await self._note(done_line(call, caller.subject, request, reply))
                return reply
            except Exception as error:  # becomes a status, whatever it is
                await self._abort(context, call, metadata, error)

        async def stream(request: object, context: Context) -> None:
            try:
                caller = await self._admit(call, metadata, context)
                request = _parsed(request, handler.request_deserializer)
                if starts_with_line(call):
                    await self._note(done_line(call, caller.subject, request, None))
                async for item in handler.unary_stream(request, context):
                    await self._send(context, item)
            except Exception as error:  # becomes a status, whatever it is
                await self._abort(context, call, metadata, error)

        return _like(handler, answer, stream)

    async def _send(self, context: Context, item: object) -> None:
        """Write a message; who does not read holds a place no longer than the limit says."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                await context.write(item)
        except TimeoutError:
            raise RequestError(
                ErrorCode.STREAM_STALLED, f"nothing was read for {self._stall_seconds:g} seconds"
            ) from None

    async def _note(self, line: AuditLine | None) -> None:
        if line is not None:
            await self._audit.note(line)

    def _refusing(
        self, handler: Handler, call: Call, metadata: Metadata, error: RequestError
    ) -> Handler:
        """A handler that turns the call away without parsing what it carries."""

        async def answer(_: object, context: Context) -> object:
            await self._abort(context, call, metadata, error)

        async def stream(_: object, context: Context) -> None:
            await self._abort(context, call, metadata, error)

        return _like(handler, answer, stream)

    async def _abort(
        self, context: Context, call: Call, metadata: Metadata, error: Exception
    ) -> NoReturn:
        refusal = as_request_error(error)
        if refusal.code is ErrorCode.INTERNAL:
            logger.error("call failed method=%s", call.name, exc_info=error)
        else:
            logger.debug("call refused method=%s: %s", call.name, refusal)
        if refusal.code not in _UNAUDITED:
            await self._note_refusal(context, call, metadata, refusal)
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

    async def _note_refusal(
        self, context: Context, call: Call, metadata: Metadata, refusal: RequestError
    ) -> None:
        """Write the refusal down; a log that cannot be written lets nobody in."""
        known = WHO.get(None) or self._admission.identify(metadata, context)
        try:
            await self._audit.refused(
                AuditLine(
                    actor=known.subject,
                    action=call.name,
                    outcome=refusal.code,
                    detail=refusal.detail,
                )
            )
        except Exception:
            logger.exception("refusal could not be written to the audit log method=%s", call.name)


def _check_version(metadata: Metadata) -> None:
    given = metadata.get(PROTOCOL_METADATA)
    if given != str(PROTOCOL_VERSION):
        raise RequestError(
            ErrorCode.PROTOCOL_UNSUPPORTED,
            f"caller speaks version {given!r:.40}, this server speaks {PROTOCOL_VERSION}",
        )


def _parsed(request: Any, parse: Parse) -> Any:  # noqa: ANN401  # a message, or a stream of them
    """The request, or its stream, as messages; no call is parsed before its caller is admitted.

    Raises:
        RequestError: REQUEST_INVALID when the bytes are no message of the kind.
    """
    if not isinstance(request, bytes):
        return _parsed_stream(request, parse)
    try:
        return parse(request)
    except DecodeError:
        raise RequestError(ErrorCode.REQUEST_INVALID, "the message cannot be parsed") from None


async def _parsed_stream(stream: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
    async for data in stream:
        yield _parsed(data, parse)


def _like(
    handler: Handler,
    answer: Callable[[Any, Context], Awaitable[object]],
    stream: Callable[[Any, Context], Awaitable[None]],
) -> Handler:
    """A handler of the same kind with another behaviour, which gets messages as bytes."""
    serializer = handler.response_serializer
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, None, serializer)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(answer, None, serializer)
    return grpc.unary_unary_rpc_method_handler(answer, None, serializer)


def as_request_error(error: Exception) -> RequestError:
    """The refusal that stands for any error; what nobody foresaw gets no details."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RequestError(ErrorCode.STORAGE_FULL)
    if isinstance(error, OperationalError):
        return RequestError(ErrorCode.SERVER_BUSY)
    return RequestError(ErrorCode.INTERNAL)
