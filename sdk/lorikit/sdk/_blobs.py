# SPDX-License-Identifier: Apache-2.0
"""The blob cache: files named by their SHA-256, resumed, verified and bounded in size."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import BinaryIO

from lorikit.proto.manifest import BlobRef, is_digest
from lorikit.sdk._durable import storage_errors, sync_folder
from lorikit.sdk._errors import DamagedBlobError, StorageFullError

logger = logging.getLogger(__name__)

_PART = ".part"
_BLOCK = 1 << 20
_Fingerprint = tuple[int, int, int]


class BlobCache:
    """A flat folder of blobs; opened packages read their files straight from it.

    A blob is looked at before it is used: its size each time, its digest at its first use in a
    process and whenever the file has changed since. A damaged one is deleted and counts as absent.
    """

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        """Args are the folder, made if absent, and the most bytes all blobs may take together."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._max_bytes = max_bytes
        self._pinned: frozenset[str] = frozenset()
        self._verified: dict[str, _Fingerprint] = {}

    def pin(self, digests: Collection[str]) -> None:
        """Name the blobs that eviction must spare; replaces the earlier choice."""
        self._pinned = frozenset(digests)

    def path(self, digest: str) -> Path:
        """Where the blob lies, or would lie.

        Raises:
            ValueError: The text is not a digest, so it must not become a file name.
        """
        if not is_digest(digest):
            raise ValueError(f"not a SHA-256 digest: {digest[:80]!r}")
        return self.folder / digest

    def has(self, blob: BlobRef) -> bool:
        """Whether the whole, undamaged blob is here; deletes a damaged one."""
        path = self.path(blob.digest)
        try:
            seen = _fingerprint(path)
        except FileNotFoundError:
            return False
        if seen[0] == blob.size and self._verified.get(blob.digest) == seen:
            return True
        if seen[0] != blob.size or _digest_of_file(path) != blob.digest:
            logger.warning("blob %s is damaged and was deleted", blob.digest)
            path.unlink(missing_ok=True)
            return False
        self._verified[blob.digest] = seen
        return True

    def read(self, blob: BlobRef) -> bytes:
        """The blob's bytes.

        Raises:
            DamagedBlobError: Absent, or damaged and deleted.
        """
        if not self.has(blob):
            raise DamagedBlobError(f"blob {blob.digest} is missing or was damaged; fetch it again")
        return self.path(blob.digest).read_bytes()

    def held_bytes(self, blob: BlobRef) -> int:
        """Bytes of the blob that are here, whole or in part."""
        if self.has(blob):
            return blob.size
        part = self._part(blob)
        return min(part.stat().st_size, blob.size) if part.exists() else 0

    def fill(
        self,
        blob: BlobRef,
        chunks: Callable[[int], Iterable[bytes]],
        *,
        on_bytes: Callable[[int], None] = lambda held: None,
    ) -> Path:
        """Get a blob, going on where an earlier attempt stopped.

        Args:
            blob: What is wanted.
            chunks: Gives the blob's bytes from an offset on. What it yields is kept on disk even
                if it raises halfway, so that the next call asks for the rest only.
            on_bytes: Called with the number of bytes held after each chunk.

        Returns:
            The file; it is durable and its digest is right.

        Raises:
            DamagedBlobError: The bytes that came are not the blob; they were deleted.
            StorageFullError: The blob does not fit; the part that did stays.
        """
        path = self.path(blob.digest)
        if self.has(blob):
            os.utime(path)
            self._verified[blob.digest] = _fingerprint(path)
            return path
        part = self._part(blob)
        if part.exists() and part.stat().st_size > blob.size:
            part.unlink()
        held = part.stat().st_size if part.exists() else 0
        self._make_room(blob.size - held, blob)
        with storage_errors(f"blob {blob.digest}"), open(part, "a+b") as file:
            digest, held = self._receive(blob, file, held, chunks, on_bytes)
            file.flush()
            os.fsync(file.fileno())
        if held < blob.size:
            raise DamagedBlobError(f"blob {blob.digest} ended {blob.size - held} bytes early")
        if digest != blob.digest:
            part.unlink()
            raise DamagedBlobError(f"blob {blob.digest} arrived damaged and was dropped")
        os.replace(part, path)
        sync_folder(self.folder)
        self._verified[blob.digest] = _fingerprint(path)
        return path

    def make(self, blob: BlobRef, pieces: Iterable[bytes]) -> Path:
        """Keep a blob that was made here; what an interrupted download left of it goes.

        Args:
            blob: What is wanted.
            pieces: All of its bytes.

        Returns:
            The file; it is durable and its digest is right.

        Raises:
            DamagedBlobError: The pieces are not the blob.
            StorageFullError: It does not fit.
        """
        self._part(blob).unlink(missing_ok=True)
        try:
            return self.fill(blob, lambda offset: pieces)
        except DamagedBlobError:
            self._part(blob).unlink(missing_ok=True)
            raise

    def total_bytes(self) -> int:
        """Bytes of all files in the cache, parts included."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def _receive(
        self,
        blob: BlobRef,
        file: BinaryIO,
        held: int,
        chunks: Callable[[int], Iterable[bytes]],
        on_bytes: Callable[[int], None],
    ) -> tuple[str, int]:
        """Append what is missing; returns the digest and the length of the whole part."""
        digest = hashlib.sha256()
        file.seek(0)
        while block := file.read(_BLOCK):
            digest.update(block)
        for chunk in chunks(held) if held < blob.size else ():
            digest.update(chunk)
            held += len(chunk)
            if held > blob.size:
                break  # the digest is wrong already; the disk need not see more
            file.write(chunk)
            file.flush()  # what the system has, a kill of this process cannot take
            on_bytes(held)
        return digest.hexdigest(), held

    def _make_room(self, wanted: int, blob: BlobRef) -> None:
        """Delete what was not used for longest until the blob fits the share and the disk."""
        excess = wanted - shutil.disk_usage(self.folder).free
        if self._max_bytes is not None:
            excess = max(excess, self.total_bytes() + wanted - self._max_bytes)
        for path in self._evictable(blob):
            if excess <= 0:
                return
            excess -= path.stat().st_size
            path.unlink()
            logger.info("evicted blob %s", path.name)
        if excess > 0:
            raise StorageFullError(
                f"blob {blob.digest} of {blob.size} bytes lacks {excess} bytes of room; free "
                f"storage, or raise storage_limit_bytes (now {self._max_bytes})"
            )

    def _evictable(self, blob: BlobRef) -> list[Path]:
        spared = {*self._pinned, blob.digest}
        paths = [p for p in self.folder.iterdir() if p.name.removesuffix(_PART) not in spared]
        return sorted(paths, key=lambda path: path.stat().st_mtime)

    def _part(self, blob: BlobRef) -> Path:
        return self.path(blob.digest).with_suffix(_PART)


def _fingerprint(path: Path) -> _Fingerprint:
    found = path.stat()
    return found.st_size, found.st_ino, found.st_ctime_ns


def _digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
