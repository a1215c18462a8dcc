# SPDX-License-Identifier: Apache-2.0
"""Blobs: named by content, whole or absent."""

from __future__ import annotations

import hashlib

import pytest

from lorikit.proto.status import ErrorCode
from lorikit.server.errors import RequestError
from lorikit.server.store.blobs import DamagedBlobError, FolderBlobs


@pytest.fixture
def blobs(tmp_path):
    return FolderBlobs(tmp_path / "blobs")


def test_blob_is_named_by_its_content(blobs):
    ref = blobs.put(b"frozen weights")

    assert ref.digest == hashlib.sha256(b"frozen weights").hexdigest()
    assert ref.size == len(b"frozen weights")
    assert blobs.path(ref.digest).read_bytes() == b"frozen weights"


def test_same_content_is_stored_once(blobs):
    first = blobs.put(b"x")
    written = blobs.path(first.digest).stat().st_mtime_ns

    assert blobs.put(b"x") == first
    assert blobs.path(first.digest).stat().st_mtime_ns == written
    assert list(blobs.digests()) == [first.digest]


def test_file_moves_in(blobs, tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"graph")

    ref = blobs.put_file(path)

    assert not path.exists()
    assert blobs.read(ref.digest) == b"graph"


def test_file_that_is_known_already_is_removed(blobs, tmp_path):
    ref = blobs.put(b"graph")
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"graph")

    assert blobs.put_file(path) == ref
    assert not path.exists()


def test_read_from_an_offset(blobs):
    digest = blobs.put(b"0123456789").digest

    assert blobs.read(digest, 4, 3) == b"456"
    assert blobs.read(digest, 8) == b"89"
    assert blobs.read(digest, 10) == b""


@pytest.mark.parametrize("offset", [-1, 11])
def test_offset_outside_the_blob_is_refused(blobs, offset):
    digest = blobs.put(b"0123456789").digest

    with pytest.raises(RequestError) as caught:
        blobs.read(digest, offset)

    assert caught.value.code is ErrorCode.OFFSET_INVALID


@pytest.mark.parametrize("name", ["0" * 64, "../../etc/passwd", "", "A" * 64])
def test_unknown_or_hostile_name_is_refused(blobs, name):
    assert not blobs.has(name)
    with pytest.raises(RequestError) as caught:
        blobs.read(name)

    assert caught.value.code is ErrorCode.BLOB_UNKNOWN


def test_failed_write_leaves_nothing(blobs, monkeypatch):
    def disk_full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)

    with pytest.raises(RequestError) as caught:
        blobs.put(b"x")

    assert caught.value.code is ErrorCode.STORAGE_FULL
    assert list(blobs.folder.iterdir()) == []


def test_temporary_files_of_a_crash_are_removed(blobs):
    kept = blobs.put(b"x")
    (blobs.folder / ".new-abc").write_bytes(b"half")

    blobs.remove_temporary()

    assert [path.name for path in blobs.folder.iterdir()] == [kept.digest]


def test_changed_file_is_noticed(blobs):
    digest = blobs.put(b"weights").digest
    assert blobs.read_whole(digest) == b"weights"
    blobs.path(digest).write_bytes(b"weighty")

    with pytest.raises(DamagedBlobError, match=digest):
        blobs.read_whole(digest)
