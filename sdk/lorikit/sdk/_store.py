# SPDX-License-Identifier: Apache-2.0
"""What a device keeps between starts: identity, blobs, task state, updates, their rests, adapter.

Every file is replaced whole and carries its digest; one that is torn or damaged counts as absent.
Names from the wire never become file names. One process at a time uses a store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lorikit.proto.device import TrainingReport
from lorikit.proto.manifest import BlobRef
from lorikit.proto.tensors import Bundle, MalformedTensorError, Tensors, pack, raw, unpack
from lorikit.sdk._blobs import BlobCache
from lorikit.sdk._durable import (
    FolderLock,
    remove_temporaries,
    seal,
    storage_errors,
    sync_folder,
    unseal,
    write_durably,
)

logger = logging.getLogger(__name__)

Meta = Mapping[str, int | float | str]
"""Numbers and texts that belong to a saved state."""

_RECORD = b"lorikit-record-1\n"
_LENGTH_BYTES = 8
_MAX_STREAMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this installation is."""

    installation_id: str
    """Random, made once."""
    device_id: str = ""
    """Given by the server; empty before enrolment."""
    token: str = field(default="", repr=False)
    """Secret given by the server; empty where a certificate stands for it."""
    key: str = field(default="", repr=False)
    """Private key, PEM, made here; empty where the server asks for no certificate."""
    certificate: str = ""
    """Certificate of the key, PEM; empty before enrolment."""
    package_key: str = ""
    """Ed25519 key, hexadecimal, that signs the packages of the server of the enrolment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingUpdate:
    """A finished update that the server does not hold yet."""

    update_id: str
    task_id: str
    report: TrainingReport
    data: bytes = field(repr=False)
    """The serialised TensorBundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastAdapter:
    """The adapter that ``predict`` and ``evaluate`` use."""

    run_id: str
    package: BlobRef
    adapter: BlobRef
    inputs: Mapping[str, float]
    """Values of the graph's scalar inputs."""
    max_length: int
    """Longest input in tokens."""
    blobs: tuple[str, ...]
    """Digests of everything it needs, spared by eviction."""


class Journal:
    """State of tasks in progress, so that a killed process goes on where it was."""

    def __init__(self, folder: Path) -> None:
        """The folder is made if absent; it belongs to the journal alone."""
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        self._folder = folder

    def save(self, task_id: str, state: Bundle, meta: Meta) -> None:
        """Replace the task's state; after a crash at any instant the old or the new one is there.

        Raises:
            StorageFullError: No room; the old state is untouched.
        """
        header = {"task_id": task_id, "meta": dict(meta)}
        write_durably(self._path(task_id), _record(header, pack(state)))

    def load(self, task_id: str) -> tuple[Bundle, dict[str, int | float | str]] | None:
        """The state saved last, or None if there is none that is whole."""
        record = _load(self._path(task_id))
        if record is None or record[0].get("task_id") != task_id:
            return None
        try:
            return unpack(record[1]), dict(record[0]["meta"])
        except (MalformedTensorError, KeyError, TypeError, ValueError):
            logger.warning("journal of task %s cannot be read and counts as absent", task_id)
            return None

    def clear(self, task_id: str) -> None:
        """Forget the task; harmless if nothing was saved."""
        _remove(self._path(task_id))

    def keep_only(self, task_id: str | None) -> None:
        """Forget every other task: the server has moved on."""
        spared = None if task_id is None else self._path(task_id)
        for path in self._folder.iterdir():
            if path != spared:
                _remove(path)

    def _path(self, task_id: str) -> Path:
        return self._folder / _file_name(task_id)


class Residuals:
    """What updates left out, by stream and round, for error feedback.

    A file per round, replaced whole: after a crash at any instant the rest of the round before is
    there, and that of this round is there or not, never half. At most eight streams are kept, those
    used last.
    """

    def __init__(self, folder: Path) -> None:
        """The folder is made if absent; it belongs to the residuals alone."""
        folder.mkdir(parents=True, exist_ok=True)
        for stream in folder.iterdir():
            remove_temporaries(stream)
        self._folder = folder

    def save(
        self, stream: str, round_number: int, left: Tensors, *, owner: str, spared: int | None
    ) -> None:
        """Keep what the round's update left out, and forget all rounds but it and ``spared``.

        Args:
            stream: The sequence of updates.
            round_number: The round in it.
            left: What was left out, by tensor.
            owner: What it belongs to; ``load`` must name the same.
            spared: Round whose rest is still needed if this update does not count.

        Raises:
            StorageFullError: No room; what was kept is untouched.
        """
        folder = self._folder / _file_name(stream)
        if not folder.exists():
            folder.mkdir()
            sync_folder(self._folder)
        path = folder / str(round_number)
        header = {"stream": stream, "round": round_number, "owner": owner}
        body = pack(Bundle({name: raw(values) for name, values in left.items()}))
        write_durably(path, _record(header, body))
        wanted = {path.name, str(spared)}
        for other in folder.iterdir():
            if other.name not in wanted:
                _remove(other)
        self._forget_old_streams()

    def load(self, stream: str, round_number: int, *, owner: str) -> Tensors | None:
        """What the round's update left out; None if nothing whole of that owner is there."""
        record = _load(self._folder / _file_name(stream) / str(round_number))
        if record is None or record[0] != {
            "stream": stream,
            "round": round_number,
            "owner": owner,
        }:
            return None
        tensors = unpack(record[1]).tensors
        return {name: each.parts["values"].astype("float32") for name, each in tensors.items()}

    def _forget_old_streams(self) -> None:
        streams = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for folder in streams[:-_MAX_STREAMS]:
            for path in folder.iterdir():
                _remove(path)
            folder.rmdir()


class Store:
    """A device's folder. Close it, or use it as a context manager, to let another client in."""

    def __init__(self, folder: Path | str, *, max_bytes: int | None = None) -> None:
        """Open the folder, made if absent.

        Args:
            folder: Where to keep everything; ``~`` stands for the user's home.
            max_bytes: Most bytes the blobs may take together; None means what the disk has.

        Raises:
            StoreBusyError: Another client uses it.
            StorageFullError: The disk is full.
        """
        self.folder = Path(folder).expanduser()
        with storage_errors("the store"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder)
            remove_temporaries(self.folder)
            self.blobs = BlobCache(self.folder / "blobs", max_bytes=max_bytes)
            self.journal = Journal(self.folder / "journal")
            self.residuals = Residuals(self.folder / "residuals")
            self._updates = self.folder / "updates"
            self._updates.mkdir(exist_ok=True)
            remove_temporaries(self._updates)

    def identity(self) -> Identity:
        """This installation's identity; made at the first call."""
        record = _load(self.folder / "identity")
        if record is not None:
            return Identity(**record[0])
        identity = Identity(installation_id=secrets.token_hex(16))
        self.save_identity(identity)
        return identity

    def save_identity(self, identity: Identity) -> None:
        """Keep the identity, in a file that only its owner can read."""
        write_durably(self.folder / "identity", _record(dataclasses.asdict(identity), b""))

    def save_update(self, update: PendingUpdate) -> None:
        """Keep a finished update until the server has it."""
        header = {
            "update_id": update.update_id,
            "task_id": update.task_id,
            "report": dataclasses.asdict(update.report),
        }
        write_durably(self._update_path(update.update_id), _record(header, update.data))

    def pending_update(self, update_id: str) -> PendingUpdate | None:
        """The finished update of that name, if it is here and whole."""
        record = _load(self._update_path(update_id))
        if record is None or record[0].get("update_id") != update_id:
            return None
        header, data = record
        return PendingUpdate(
            update_id=update_id,
            task_id=header["task_id"],
            report=TrainingReport(**header["report"]),
            data=data,
        )

    def clear_update(self, update_id: str) -> None:
        """Forget an update that the server holds or does not want."""
        _remove(self._update_path(update_id))

    def keep_only(self, *, task_id: str | None, update_id: str | None) -> None:
        """Forget the journals and updates of every other task: the server has moved on."""
        self.journal.keep_only(task_id)
        spared = None if update_id is None else self._update_path(update_id)
        for path in self._updates.iterdir():
            if path != spared:
                _remove(path)

    def last_adapter(self) -> LastAdapter | None:
        """The adapter in use, or None before the first."""
        record = _load(self.folder / "adapter")
        if record is None:
            return None
        header = record[0]
        return LastAdapter(
            run_id=header["run_id"],
            package=BlobRef(**header["package"]),
            adapter=BlobRef(**header["adapter"]),
            inputs=header["inputs"],
            max_length=header["max_length"],
            blobs=tuple(header["blobs"]),
        )

    def save_last_adapter(self, adapter: LastAdapter) -> None:
        """Use this adapter from now on, also after a restart."""
        write_durably(self.folder / "adapter", _record(dataclasses.asdict(adapter), b""))

    def close(self) -> None:
        """Let another client use the folder."""
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _update_path(self, update_id: str) -> Path:
        return self._updates / _file_name(update_id)


def _file_name(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _record(header: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    return seal(_RECORD, len(text).to_bytes(_LENGTH_BYTES, "little") + text + body)


def _load(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """Header and body of a record file; None if it is absent, torn or damaged."""
    try:
        payload = unseal(_RECORD, path.read_bytes())
    except FileNotFoundError:
        return None
    if payload is None:
        logger.warning("%s is damaged and counts as absent", path.name)
        return None
    split = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    return json.loads(payload[_LENGTH_BYTES:split]), payload[split:]


def _remove(path: Path) -> None:
    if path.exists():
        path.unlink()
        sync_folder(path.parent)
