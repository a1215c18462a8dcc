# SPDX-License-Identifier: Apache-2.0
"""Sending a blob in chunks, from any offset."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from lorikit.proto.limits import CHUNK_BYTES
from lorikit.proto.status import ErrorCode
from lorikit.server.config import LimitsConfig
from lorikit.server.errors import RequestError
from lorikit.server.offload import Offload
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.tasks import TaskBoard


@dataclass(frozen=True, slots=True)
class BlobChunk:
    """A piece of a blob."""

    offset: int
    data: bytes
    digest: bytes
    """SHA-256 of ``data``, raw."""
    total_size: int


class Downloads:
    """Blobs on their way out; one chunk per download is in memory at a time."""

    def __init__(
        self, blobs: FolderBlobs, *, board: TaskBoard, offload: Offload, limits: LimitsConfig
    ) -> None:
        """Bind the parts; ``blobs`` holds what any enrolled device may have."""
        self._blobs = blobs
        self._board = board
        self._offload = offload
        self._limits = limits
        self._active = 0

    async def chunks(self, device_id: str, digest: str, offset: int) -> AsyncIterator[BlobChunk]:
        """The blob from ``offset``; at least one chunk, which is empty at the blob's end.

        Raises:
            RequestError: BLOB_UNKNOWN, OFFSET_INVALID, or SERVER_BUSY.
        """
        if self._active >= self._limits.max_downloads:
            raise RequestError(
                ErrorCode.SERVER_BUSY,
                f"{self._active} downloads at a time",
                retry_seconds=self._limits.busy_retry_seconds,
            )
        self._active += 1
        try:
            size = self._blobs.ref(digest).size
            while True:
                chunk = await self._offload.file(self._read, digest, offset, size)
                self._board.touch(device_id)
                yield chunk
                offset += len(chunk.data)
                if offset >= size:
                    self._board.received(device_id, digest)
                    return
        finally:
            self._active -= 1

    def _read(self, digest: str, offset: int, size: int) -> BlobChunk:
        data = self._blobs.read(digest, offset, CHUNK_BYTES)
        return BlobChunk(offset, data, hashlib.sha256(data).digest(), size)
