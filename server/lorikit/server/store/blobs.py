# SPDX-License-Identifier: Apache-2.0
"""Content-addressed files in one flat folder, each named by the SHA-256 of its content.

A blob appears under its name only when it is whole and on disk: it is written to a temporary file,
flushed to the device, and renamed. What a crash leaves behind is a temporary file, which the next
start removes; it is never a damaged blob.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lorikit.proto.manifest import BlobRef, digest_of, is_digest
from lorikit.proto.status import ErrorCode
from lorikit.server.errors import LorikitError, RequestError

_TEMPORARY_PREFIX = ".new-"
_COPY_BYTES = 1 << 20


class DamagedBlobError(LorikitError):
    """A file no longer holds what its name says; the disk or somebody changed it."""


class FolderBlobs:
    """Blobs in a folder; safe for several threads and processes at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the folder; it is made where it does not exist."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> BlobRef:
        """Store bytes durably and return their name; storing them again changes nothing.

        Raises:
            RequestError: STORAGE_FULL when the disk has no room.
        """
        ref = BlobRef(digest=digest_of(data), size=len(data))
        if not self.has(ref.digest):
            with self._temporary(ref.digest) as file:
                file.write(data)
        return ref

    def put_file(self, path: Path) -> BlobRef:
        """Move a file into the folder and return its name; the path is gone afterwards.

        A file of another file system is copied and then removed.

        Raises:
            RequestError: STORAGE_FULL when the disk has no room.
        """
        ref = BlobRef(digest=_file_digest(path), size=path.stat().st_size)
        if self.has(ref.digest):
            path.unlink()
            return ref
        try:
            _sync(path)
            path.replace(self.path(ref.digest))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with path.open("rb") as source, self._temporary(ref.digest) as file:
                shutil.copyfileobj(source, file, _COPY_BYTES)
            path.unlink()
        _sync(self.folder)
        return ref

    def path(self, digest: str) -> Path:
        """Where the blob lies, or would lie.

        Raises:
            RequestError: BLOB_UNKNOWN when the text is no digest, so that no path of the caller's
                making ever reaches the file system.
        """
        if not is_digest(digest):
            raise RequestError(ErrorCode.BLOB_UNKNOWN, f"not a SHA-256 digest: {digest[:80]!r}")
        return self.folder / digest

    def has(self, digest: str) -> bool:
        """Whether the blob is here, whole."""
        return is_digest(digest) and (self.folder / digest).is_file()

    def ref(self, digest: str) -> BlobRef:
        """The blob's name and size.

        Raises:
            RequestError: BLOB_UNKNOWN.
        """
        try:
            return BlobRef(digest=digest, size=self.path(digest).stat().st_size)
        except FileNotFoundError:
            raise RequestError(ErrorCode.BLOB_UNKNOWN, f"no blob {digest}") from None

    def read(self, digest: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of the blob from ``offset``, at most ``length`` of them (all when None).

        Raises:
            RequestError: BLOB_UNKNOWN, or OFFSET_INVALID when the offset lies outside the blob (the
                blob's size itself is allowed and gives no bytes).
        """
        size = self.ref(digest).size
        if not 0 <= offset <= size:
            raise RequestError(
                ErrorCode.OFFSET_INVALID, f"offset {offset} lies outside 0..{size} of {digest}"
            )
        with self.path(digest).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else max(length, 0))

    def read_whole(self, digest: str) -> bytes:
        """All bytes of the blob, checked against its name.

        Raises:
            RequestError: BLOB_UNKNOWN.
            DamagedBlobError: The file has changed since it was stored.
        """
        data = self.read(digest)
        if digest_of(data) != digest:
            raise DamagedBlobError(f"{self.path(digest)} is damaged; restore it from a backup")
        return data

    def digests(self) -> Iterator[str]:
        """Names of all blobs, in no order."""
        return (entry.name for entry in os.scandir(self.folder) if is_digest(entry.name))

    def remove(self, digest: str) -> None:
        """Forget a blob; one that is not here is no error."""
        self.path(digest).unlink(missing_ok=True)

    def remove_temporary(self) -> None:
        """Remove what an interrupted writer left; call it only while nobody writes."""
        for path in self.folder.glob(f"{_TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, digest: str) -> Iterator[BinaryIO]:
        """A file that becomes the blob when the block ends well, and vanishes otherwise."""
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=self.folder)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path(digest))
            _sync(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RequestError(ErrorCode.STORAGE_FULL, f"no room for blob {digest}") from error
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
