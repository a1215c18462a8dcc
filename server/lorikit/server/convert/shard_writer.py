# SPDX-License-Identifier: Apache-2.0
"""Writes one shard tensor by tensor, so that a killed conversion goes on behind the last one.

The file has room for its header at the front; tensors are appended and made durable, then noted in
a journal beside it, one line each. Whatever lies behind the last noted byte is cut off at the next
start. When all are there, the header takes its place and the file its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lorikit.proto.tensors import Array, Encoded
from lorikit.server.convert.safetensors import DTYPES, Shard, Stored
from lorikit.server.convert.targets import AS_IT_IS, Errors

FORMAT = 1
"""Format of converted folders that this version writes and reads."""

_PARTIAL = ".partial"
_JOURNAL = ".journal"
_ENTRY_BYTES = 224
_MOST_PARTS = 4


@dataclass(slots=True, kw_only=True)
class Written:
    """One tensor of a shard that is there."""

    name: str
    codec: str
    shape: tuple[int, ...]
    kind: str
    source_nbytes: int
    nbytes: int
    errors: Errors = field(default_factory=Errors)
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Rows of the header, by the part's name."""


class ShardWriter:
    """One shard of a converted folder, written or taken up where it was left."""

    def __init__(self, path: Path, source: Shard, target: str) -> None:
        """Open the shard.

        Args:
            path: Where it will be.
            source: The shard that is converted; another one, or one that has changed, starts anew.
            target: Codec of the folder.
        """
        self.written: dict[str, Written] = {}
        """The tensors that are there, by name."""
        self._path = path
        self._identity = {"format": FORMAT, "source": source.identity, "target": target}
        self._room = _header_room(source)
        self._journal = path.with_name(path.name + _JOURNAL)
        self._partial = path.with_name(path.name + _PARTIAL)
        self._end = 0
        self._file: BinaryIO | None = None
        self._take_up()

    def append(self, tensor: Stored, encoded: Encoded, kind: str, errors: Errors) -> None:
        """Add an encoded tensor."""
        written = Written(
            name=tensor.name,
            codec=encoded.codec,
            shape=tensor.shape,
            kind=kind,
            source_nbytes=tensor.nbytes,
            nbytes=encoded.nbytes,
            errors=errors,
        )
        parts = {f"{tensor.name}/{role}": part for role, part in sorted(encoded.parts.items())}
        written.entries = {
            name: self._placed(DTYPES[part.dtype.name], part.shape, _bytes(part))
            for name, part in parts.items()
        }
        self._note(written)

    def copy(self, tensor: Stored, kind: str) -> None:
        """Add a tensor byte for byte."""
        written = Written(
            name=tensor.name,
            codec=AS_IT_IS,
            shape=tensor.shape,
            kind=kind,
            source_nbytes=tensor.nbytes,
            nbytes=tensor.nbytes,
        )
        written.entries = {tensor.name: self._placed(tensor.dtype, tensor.shape, tensor.raw())}
        self._note(written)

    def finish(self) -> None:
        """Put the header in its place, and give the file its name."""
        if self._file is None:
            return
        header: dict[str, Any] = {
            "__metadata__": {"format": "lorikit", "codec": str(self._identity["target"])}
        }
        for written in self.written.values():
            header.update(written.entries)
        text = json.dumps(header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._make_durable()
        self._file.close()
        os.replace(self._partial, self._path)

    def close(self) -> None:
        """Leave the shard as it is, for a later start."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take_up(self) -> None:
        """Read the journal of an earlier start, and cut off what it does not know."""
        lines = _lines(self._journal)
        if not lines or lines[0] != self._identity:
            self._path.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)
            _write_line(self._journal, self._identity, mode="w")
        for line in lines[1:] if lines and lines[0] == self._identity else []:
            written = _from_line(line)
            self.written[written.name] = written
            ends = [entry["data_offsets"][1] for entry in written.entries.values()]
            self._end = max([self._end, *ends])
        if self._path.exists():
            return
        self._file = self._partial.open("r+b" if self._partial.exists() else "w+b")
        if self._file.seek(0, os.SEEK_END) < 8 + self._room + self._end:
            self.written.clear()  # the journal outlived its data
            self._end = 0
            _write_line(self._journal, self._identity, mode="w")
        self._file.truncate(8 + self._room + self._end)

    def _placed(self, dtype: str, shape: tuple[int, ...], data: bytes) -> dict[str, Any]:
        """Append the bytes; returns the row of the header."""
        assert self._file is not None, "a whole shard lacks no tensor"
        self._file.seek(8 + self._room + self._end)
        self._file.write(data)
        begin, self._end = self._end, self._end + len(data)
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, self._end]}

    def _note(self, written: Written) -> None:
        self._make_durable()
        _write_line(self._journal, _to_line(written), mode="a")
        self.written[written.name] = written

    def _make_durable(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())


def _header_room(source: Shard) -> int:
    """Bytes that the header may take at most; a multiple of eight, so that data are aligned."""
    names = sum(_MOST_PARTS * (len(json.dumps(t.name)) + _ENTRY_BYTES) for t in source.tensors)
    return -(-(names + 512) // 8) * 8


def _bytes(part: Array) -> bytes:
    return np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; one that was torn ends it."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def _write_line(path: Path, value: Mapping[str, Any], *, mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _to_line(written: Written) -> dict[str, Any]:
    errors = written.errors
    return {
        "name": written.name,
        "codec": written.codec,
        "shape": list(written.shape),
        "kind": written.kind,
        "source_nbytes": written.source_nbytes,
        "nbytes": written.nbytes,
        "errors": [errors.signal, errors.noise, errors.largest],
        "entries": dict(written.entries),
    }


def _from_line(line: Mapping[str, Any]) -> Written:
    signal, noise, largest = line["errors"]
    return Written(
        name=line["name"],
        codec=line["codec"],
        shape=tuple(line["shape"]),
        kind=line["kind"],
        source_nbytes=line["source_nbytes"],
        nbytes=line["nbytes"],
        errors=Errors(signal=signal, noise=noise, largest=largest),
        entries=line["entries"],
    )
