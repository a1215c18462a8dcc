# SPDX-License-Identifier: Apache-2.0
"""The safetensors layout, read by mapping one tensor at a time.

A file is the length of its header (8 bytes, little endian), the header as JSON, and the tensors'
bytes one after the other. Nothing of a tensor is in memory before a piece of it is asked for, and
nothing stays.

Source:
    https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorikit.proto.tensors import Array, Float32
from lorikit.server.convert.errors import ConversionError

INDEX = "model.safetensors.index.json"
"""File that says which shard a tensor is in."""

_MAX_HEADER_BYTES = 100 << 20

_HALVES: Float32 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""Every float16 as float32, by its bits: looking it up is twice as fast as casting."""

_FLOATS: Mapping[str, str] = {"F32": "<f4", "F16": "<u2", "BF16": "<u2", "F64": "<f8"}

WIDTHS: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element by the name of its type."""

DTYPES: Mapping[str, str] = {
    "float32": "F32", "float16": "F16", "uint16": "U16", "uint8": "U8", "int8": "I8",
}  # fmt: skip
"""Name of a type by numpy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor in a file."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of the first byte in the file."""
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether its elements are real numbers."""
        return self.dtype in _FLOATS

    def pieces(self, rows: int) -> Iterator[Float32]:
        """The values as float32 matrices [up to ``rows``, columns], one after the other."""
        columns = self.shape[-1] if self.shape else 1
        count = math.prod(self.shape[:-1])
        if not math.prod(self.shape):
            yield np.zeros((count, columns), np.float32)
            return
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            yield self._floats(start * columns, stop * columns).reshape(stop - start, columns)

    def raw(self) -> bytes:
        """All bytes, as they lie in the file."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.nbytes)

    def array(self, dtype: np.dtype[Any]) -> Array:
        """All values, of that type, in the tensor's shape."""
        return np.frombuffer(self.raw(), dtype).reshape(self.shape)

    def _floats(self, start: int, stop: int) -> Float32:
        dtype = np.dtype(_FLOATS[self.dtype])
        place = self.offset + start * dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(place)
            values = np.fromfile(file, dtype, stop - start)
        if values.size != stop - start:
            raise ConversionError(f"{self.path} ends in the middle of {self.name}; copy it again")
        if self.dtype == "F16":
            return np.take(_HALVES, values, mode="clip")  # "raise" would buffer the output
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(over="ignore"):  # what does not fit is refused as not finite
            return values.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of weights."""

    path: Path
    tensors: tuple[Stored, ...]
    """In the order of their bytes."""
    identity: str
    """Changes when the file does: size, time of change, and a digest of the header."""


def read_folder(folder: Path) -> list[Shard]:
    """The shards of a model folder, in the order of their names.

    Raises:
        ConversionError: No safetensors, one that its index names is missing, or a malformed one.
    """
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConversionError(f"{index} is not an index of safetensors: {error}") from error
        paths = [path for path in paths if path.name in named]
        if missing := sorted(named - {path.name for path in paths}):
            raise ConversionError(f"{folder} lacks {missing[0]}, which its index names")
    if not paths:
        raise ConversionError(
            f"{folder} holds no *.safetensors; save the model with save_pretrained()"
        )
    return [read_shard(path) for path in paths]


def read_shard(path: Path) -> Shard:
    """The tensors of a file, without their values.

    Raises:
        ConversionError: Not a safetensors file, or its header does not fit its size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ConversionError(f"{path} is not a safetensors file")
        header = file.read(length)
    try:
        entries = json.loads(header)
        tensors = [
            _stored(path, name, entry, 8 + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(f"{path} has a malformed header: {error}") from error
    for tensor in tensors:
        if tensor.offset < 8 + length or tensor.offset + tensor.nbytes > size:
            raise ConversionError(f"{path} is cut off: {tensor.name} lies beyond its end")
    digest = hashlib.sha256(header).hexdigest()
    return Shard(
        path=path,
        tensors=tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name))),
        identity=f"{size}-{path.stat().st_mtime_ns}-{digest}",
    )


def _stored(path: Path, name: str, entry: Mapping[str, Any], data: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    if entry["dtype"] not in WIDTHS:
        raise ConversionError(f"{path}: {name} has the unknown type {entry['dtype']!r:.40}")
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * WIDTHS[entry["dtype"]]:
        raise ConversionError(f"{path}: {name} has {end - begin} bytes, not those of {shape}")
    return Stored(
        name=name,
        dtype=entry["dtype"],
        shape=shape,
        path=path,
        offset=data + begin,
        nbytes=end - begin,
    )
