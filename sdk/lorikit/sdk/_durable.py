# SPDX-License-Identifier: Apache-2.0
"""Files that survive a power cut: whole or absent, never half, and never two writers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorikit.sdk._errors import StorageFullError, StoreBusyError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DIGEST_BYTES = hashlib.sha256().digest_size
TEMPORARY_SUFFIX = ".tmp"
"""Ending of files that were being written; whatever bears it after a start is rubbish."""


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into ``StorageFullError``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFullError(
            f"no room to write {what}: {error.strerror}; free some storage or lower what the "
            "store may use"
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that after a crash at any instant it holds the old or the new bytes.

    The file is readable and writable by its owner alone.

    Raises:
        StorageFullError: No room; the old file is untouched and nothing is left behind.
    """
    with storage_errors(path.name):
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=path.name[:16], suffix=TEMPORARY_SUFFIX
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in the folder durable, where the system can do that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process was writing."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def seal(kind: bytes, payload: bytes) -> bytes:
    """The payload behind its kind and SHA-256, so that a torn or damaged file is noticed."""
    return kind + hashlib.sha256(payload).digest() + payload


def unseal(kind: bytes, data: bytes) -> bytes | None:
    """The sealed payload; None if the bytes are of another kind, torn or damaged."""
    if data[: len(kind)] != kind:
        return None
    digest = data[len(kind) : len(kind) + _DIGEST_BYTES]
    payload = data[len(kind) + _DIGEST_BYTES :]
    return payload if hashlib.sha256(payload).digest() == digest else None


class FolderLock:
    """A folder's lock file, held by one process at a time; a dead process holds nothing."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            StoreBusyError: Another client, of this process or another one, holds it.
        """
        self._file = open(folder / "lock", "a+b")  # noqa: SIM115  # open for as long as we hold it
        try:
            _lock(self._file.fileno())
        except OSError as error:
            self._file.close()
            raise StoreBusyError(
                f"{folder} is in use by another client; stop that one or give each its own store"
            ) from error

    def release(self) -> None:
        """Let others in; harmless when repeated."""
        self._file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
