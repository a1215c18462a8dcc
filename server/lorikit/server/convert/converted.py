# SPDX-License-Identifier: Apache-2.0
"""Reads a converted folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorikit.proto.tensors import Array, Encoded, Float32
from lorikit.quantization import codec
from lorikit.server.convert.conversion import DESCRIPTION
from lorikit.server.convert.errors import ConversionError
from lorikit.server.convert.safetensors import DTYPES, Stored, read_shard
from lorikit.server.convert.shard_writer import FORMAT
from lorikit.server.convert.targets import AS_IT_IS

_NUMPY = {name: np.dtype(numpy).newbyteorder("<") for numpy, name in DTYPES.items()}


class ConvertedFolder:
    """The tensors of a folder that ``convert`` wrote."""

    def __init__(self, folder: Path) -> None:
        """Read the description and the shards' headers, no weights.

        Raises:
            ConversionError: Not a converted folder, of a newer format, or a part is missing.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise ConversionError(f"{folder} has no {DESCRIPTION}; its conversion is not finished")
        description = json.loads(path.read_bytes())
        if description["format"] != FORMAT:
            raise ConversionError(
                f"{folder} has format {description['format']}, this version reads {FORMAT}"
            )
        self.codec: str = description["codec"]
        """Target of the conversion."""
        self._codecs: dict[str, str] = {n: t["codec"] for n, t in description["tensors"].items()}
        files = {t["file"] for t in description["tensors"].values()}
        self._stored: dict[str, Stored] = {
            stored.name: stored for file in sorted(files) for stored in _tensors(folder / file)
        }
        self._shapes: dict[str, tuple[int, ...]] = {
            n: tuple(t["shape"]) for n, t in description["tensors"].items()
        }

    def names(self) -> Iterator[str]:
        """Names of the tensors, in the order of the source."""
        return iter(self._codecs)

    def encoded(self, name: str) -> Encoded:
        """A converted tensor as its codec left it.

        Raises:
            ConversionError: No such tensor, it was copied as it is, or a part of it is missing.
        """
        named = self._codecs.get(name)
        if not named:
            raise ConversionError(f"{name} was not converted; known are {len(self._codecs)} names")
        prefix = f"{name}/"
        parts: dict[str, Array] = {
            stored.name.removeprefix(prefix): stored.array(_NUMPY[stored.dtype])
            for stored in self._stored.values()
            if stored.name.startswith(prefix)
        }
        return Encoded(named, self._shapes[name], parts)

    def decoded(self, name: str) -> Float32:
        """The values a device would compute with, float32.

        Raises:
            ConversionError: No such tensor, or it does not hold real numbers.
        """
        if self._codecs.get(name) != AS_IT_IS:
            encoded = self.encoded(name)
            return codec(encoded.codec).decode(encoded)
        stored = self._stored[name]
        if not stored.is_float:
            raise ConversionError(f"{name} holds {stored.dtype}, no real numbers")
        pieces = list(stored.pieces(1 << 40))
        return pieces[0].reshape(stored.shape)


def _tensors(path: Path) -> tuple[Stored, ...]:
    if not path.is_file():
        raise ConversionError(f"{path} is missing; convert the model again")
    return read_shard(path).tensors
