# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lorikit.proto.device import TrainingReport
from lorikit.proto.manifest import BlobRef, digest_of
from lorikit.proto.tensors import Bundle, raw
from lorikit.sdk._blobs import BlobCache
from lorikit.sdk._errors import (
    ConnectionLostError,
    DamagedBlobError,
    StorageFullError,
    StoreBusyError,
)
from lorikit.sdk._store import Identity, Journal, LastAdapter, PendingUpdate, Store

DATA = bytes(range(256)) * 40
BLOB = BlobRef(digest=digest_of(DATA), size=len(DATA))


def from_offset(data: bytes, size: int = 1000) -> Iterator[bytes]:
    def chunks(offset: int) -> Iterator[bytes]:
        for start in range(offset, len(data), size):
            yield data[start : start + size]

    return chunks  # type: ignore[return-value]


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "blobs")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def state(value: float) -> Bundle:
    return Bundle({"a": raw(np.full((3, 2), value))}, {"step": value})


def test_journal_gives_back_what_was_saved_last(journal: Journal) -> None:
    journal.save("task", state(1.0), {"phase": 0})
    journal.save("task", state(2.0), {"phase": 1, "rng": "abc", "loss": 0.5})

    loaded = journal.load("task")

    assert loaded is not None
    bundle, meta = loaded
    np.testing.assert_array_equal(bundle.tensors["a"].parts["values"], np.full((3, 2), 2.0))
    assert bundle.scalars == {"step": 2.0}
    assert meta == {"phase": 1, "rng": "abc", "loss": 0.5}


def test_journal_of_another_task_is_not_given(journal: Journal) -> None:
    journal.save("task", state(1.0), {})

    assert journal.load("other") is None


def test_cleared_journal_is_gone_and_clearing_twice_is_harmless(journal: Journal) -> None:
    journal.save("task", state(1.0), {})

    journal.clear("task")
    journal.clear("task")

    assert journal.load("task") is None


def test_journal_forgets_all_tasks_but_one(journal: Journal) -> None:
    journal.save("old", state(1.0), {})
    journal.save("new", state(2.0), {})

    journal.keep_only("new")

    assert journal.load("old") is None
    assert journal.load("new") is not None


@pytest.mark.parametrize("kept", [0, 5, 40, 100, -1])
def test_torn_journal_counts_as_absent(journal: Journal, tmp_path: Path, kept: int) -> None:
    journal.save("task", state(1.0), {})
    (path,) = (tmp_path / "journal").iterdir()

    path.write_bytes(path.read_bytes()[:kept])

    assert journal.load("task") is None


def test_each_flipped_byte_of_a_journal_is_noticed(journal: Journal, tmp_path: Path) -> None:
    journal.save("task", state(1.0), {"phase": 1})
    (path,) = (tmp_path / "journal").iterdir()
    whole = path.read_bytes()

    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        assert journal.load("task") is None


def test_task_names_from_the_wire_never_leave_the_folder(journal: Journal, tmp_path: Path) -> None:
    journal.save("../../escape", state(1.0), {})

    assert journal.load("../../escape") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


def test_full_disk_keeps_the_old_journal(journal: Journal, tmp_path: Path) -> None:
    journal.save("task", state(1.0), {})
    large = Bundle({"a": raw(np.zeros(100_000))}, {})

    with file_size_limit(50_000), pytest.raises(StorageFullError, match="free some storage"):
        journal.save("task", large, {})

    loaded = journal.load("task")
    assert loaded is not None
    assert loaded[0].scalars == {"step": 1.0}
    assert len(list((tmp_path / "journal").iterdir())) == 1


class file_size_limit:  # noqa: N801  # reads as a statement
    """Make the kernel refuse to let files grow, as a full disk does."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


WRITER = """
import sys
import numpy as np
from pathlib import Path
from lorikit.proto.tensors import Bundle, raw
from lorikit.sdk._store import Journal
journal = Journal(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    journal.save("task", Bundle({"a": raw(np.full(20_000, step))}, {}), {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("kill_after", [1, 7, 23])
def test_process_killed_while_writing_leaves_a_whole_journal(
    tmp_path: Path, kill_after: int
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(kill_after):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = max([last, *(int(line) for line in writer.stdout)])
    writer.wait()
    writer.stdout.close()

    journal = Journal(tmp_path)

    loaded = journal.load("task")
    assert loaded is not None
    step = loaded[1]["step"]
    assert step in (last, last + 1)
    np.testing.assert_array_equal(loaded[0].tensors["a"].parts["values"], step)
    assert len(list(tmp_path.iterdir())) == 1


def test_blob_is_kept_under_its_digest(cache: BlobCache) -> None:
    path = cache.fill(BLOB, from_offset(DATA))

    assert path == cache.folder / BLOB.digest
    assert path.read_bytes() == DATA
    assert cache.has(BLOB)
    assert cache.read(BLOB) == DATA


def test_blob_that_is_here_is_not_asked_for(cache: BlobCache) -> None:
    cache.fill(BLOB, from_offset(DATA))

    cache.fill(BLOB, lambda offset: pytest.fail("asked for bytes that are here"))


def test_download_goes_on_where_the_connection_broke(cache: BlobCache) -> None:
    asked: list[int] = []

    def broken(offset: int) -> Iterator[bytes]:
        asked.append(offset)
        yield DATA[offset : offset + 3000]
        raise ConnectionLostError("gone")

    for _ in range(2):
        with pytest.raises(ConnectionLostError):
            cache.fill(BLOB, broken)
    assert cache.held_bytes(BLOB) == 6000
    cache.fill(BLOB, lambda offset: asked.append(offset) or from_offset(DATA)(offset))

    assert asked == [0, 3000, 6000]
    assert cache.read(BLOB) == DATA


def test_progress_counts_bytes_held(cache: BlobCache) -> None:
    held: list[int] = []

    cache.fill(BLOB, from_offset(DATA, size=4096), on_bytes=held.append)

    assert held == [4096, 8192, len(DATA)]


def test_wrong_bytes_are_dropped(cache: BlobCache) -> None:
    wrong = bytes(len(DATA))

    with pytest.raises(DamagedBlobError, match="arrived damaged"):
        cache.fill(BLOB, from_offset(wrong))

    assert cache.held_bytes(BLOB) == 0
    assert list(cache.folder.iterdir()) == []


def test_short_stream_is_not_taken_for_the_whole(cache: BlobCache) -> None:
    with pytest.raises(DamagedBlobError, match="ended 240 bytes early"):
        cache.fill(BLOB, from_offset(DATA[:10_000]))

    assert not cache.has(BLOB)
    assert cache.held_bytes(BLOB) == 10_000


def test_endless_stream_is_cut_at_the_declared_size(cache: BlobCache) -> None:
    def endless(offset: int) -> Iterator[bytes]:
        while True:
            yield bytes(5000)

    with pytest.raises(DamagedBlobError):
        cache.fill(BLOB, endless)

    assert cache.total_bytes() == 0


@pytest.mark.parametrize("size", [len(DATA), len(DATA) - 1])
def test_damaged_file_is_never_served(cache: BlobCache, size: int) -> None:
    path = cache.fill(BLOB, from_offset(DATA))
    path.write_bytes(b"x" + DATA[1:size])

    with pytest.raises(DamagedBlobError):
        cache.read(BLOB)

    assert not path.exists()


def test_damage_from_before_this_process_is_noticed(cache: BlobCache) -> None:
    path = cache.path(BLOB.digest)
    path.write_bytes(b"x" + DATA[1:])

    assert not cache.has(BLOB)


@pytest.mark.parametrize("name", ["../identity", "a" * 63, BLOB.digest.upper(), ""])
def test_text_that_is_no_digest_never_becomes_a_path(cache: BlobCache, name: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256 digest"):
        cache.path(name)


def fill_with(cache: BlobCache, letter: bytes, size: int = 4000) -> BlobRef:
    data = letter * size
    blob = BlobRef(digest=digest_of(data), size=size)
    cache.fill(blob, from_offset(data))
    return blob


def test_blobs_unused_for_longest_are_evicted_first(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=10_000)
    first, second = fill_with(cache, b"a"), fill_with(cache, b"b")
    os.utime(cache.path(first.digest), (2, 2))
    os.utime(cache.path(second.digest), (1, 1))

    third = fill_with(cache, b"c")

    assert [cache.has(blob) for blob in (first, second, third)] == [True, False, True]


def test_pinned_blobs_are_spared(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=10_000)
    first, second = fill_with(cache, b"a"), fill_with(cache, b"b")
    cache.pin({first.digest})
    os.utime(cache.path(first.digest), (1, 1))

    fill_with(cache, b"c")

    assert cache.has(first)
    assert not cache.has(second)


def test_blob_that_fits_nowhere_is_refused_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=10_000)
    cache.pin({fill_with(cache, b"a").digest})

    with pytest.raises(StorageFullError, match="lacks 240 bytes"):
        cache.fill(
            BlobRef(digest=BLOB.digest, size=6240), lambda offset: pytest.fail("asked anyway")
        )


def test_full_disk_while_downloading_keeps_what_fitted(cache: BlobCache) -> None:
    with file_size_limit(5000), pytest.raises(StorageFullError):
        cache.fill(BLOB, from_offset(DATA))

    assert 0 < cache.held_bytes(BLOB) <= 5000
    cache.fill(BLOB, from_offset(DATA))
    assert cache.read(BLOB) == DATA


def test_identity_stays_the_same_and_is_private(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        made = store.identity()
        store.save_identity(
            Identity(installation_id=made.installation_id, device_id="d", token="secret")
        )

    with Store(tmp_path) as store:
        identity = store.identity()

    assert identity.installation_id == made.installation_id
    assert len(identity.installation_id) == 32
    assert (identity.device_id, identity.token) == ("d", "secret")
    assert "secret" not in repr(identity)
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o600


def test_damaged_identity_gives_way_to_a_new_one(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        before = store.identity()
        (tmp_path / "identity").write_bytes(b"rubbish")

        assert store.identity().installation_id != before.installation_id


def test_finished_update_waits_for_its_upload(tmp_path: Path) -> None:
    update = PendingUpdate(
        update_id="u/1", task_id="t", report=TrainingReport(examples=7, accuracy=0.5), data=DATA
    )
    with Store(tmp_path) as store:
        store.save_update(update)

    with Store(tmp_path) as store:
        assert store.pending_update("u/1") == update
        assert store.pending_update("u/2") is None
        store.clear_update("u/1")
        assert store.pending_update("u/1") is None


def test_work_of_earlier_tasks_is_forgotten(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for name in ("old", "new"):
            store.journal.save(name, state(1.0), {})
            store.save_update(
                PendingUpdate(update_id=name, task_id=name, report=TrainingReport(), data=b"")
            )

        store.keep_only(task_id="new", update_id="new")

        assert store.pending_update("old") is None
        assert store.journal.load("old") is None
        assert store.pending_update("new") is not None
        assert store.journal.load("new") is not None


def test_last_adapter_survives_a_restart(tmp_path: Path) -> None:
    last = LastAdapter(
        run_id="r",
        package=BLOB,
        adapter=BLOB,
        inputs={"lora_scale": 2.0},
        max_length=32,
        blobs=(BLOB.digest,),
    )
    with Store(tmp_path) as store:
        assert store.last_adapter() is None
        store.save_last_adapter(last)

    with Store(tmp_path) as store:
        assert store.last_adapter() == last


def test_second_client_on_one_store_gets_a_clear_error(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(StoreBusyError, match="in use by another client"):
        Store(tmp_path)

    Store(tmp_path).close()


HOLDER = """
import sys, time
from lorikit.sdk._store import Store
store = Store(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_killed_process_does_not_keep_the_store(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreBusyError):
        Store(tmp_path)

    holder.kill()
    holder.wait()
    holder.stdout.close()

    Store(tmp_path).close()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    Store(tmp_path).close()
    for folder in (tmp_path, tmp_path / "journal", tmp_path / "updates"):
        (folder / "half.tmp").write_bytes(b"half")

    Store(tmp_path).close()

    assert list(tmp_path.rglob("*.tmp")) == []


def test_two_threads_may_write_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    threads = [
        threading.Thread(target=journal.save, args=(f"task-{n}", state(n), {})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(journal.load(f"task-{n}") is not None for n in range(8))
