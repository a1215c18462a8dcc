# SPDX-License-Identifier: Apache-2.0
"""A graph's constants as tensors: mapped from the package's blobs, never copied on a CPU."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorikit.sdk._errors import InvalidGraphError, UnsupportedPackageError
from lorikit.sdk.engines._onnx_file import is_external, nbytes, place
from lorikit.sdk.engines._torch.base import INT4, TYPES, UINT4, Nibbles, Value, is_data


class Constants:
    """Reads the initializers of one graph."""

    def __init__(self, folder: Path, blobs: Mapping[str, int], device: torch.device) -> None:
        """Args are the folder of the blobs, their sizes by digest, and where to compute."""
        self._folder = folder
        self._blobs = blobs
        self._device = device
        self._mapped: dict[str, mmap.mmap] = {}

    def read(self, tensors: Iterable[Any]) -> dict[str, Value]:
        """Every constant by name, in the form it is stored in.

        On a CPU those of blobs are views of the mapped files, whose pages the system may drop; on
        another device each is copied there once.

        Raises:
            InvalidGraphError: A tensor names bytes outside the blobs or too few of them.
            UnsupportedPackageError: An element type that is unknown here.
        """
        return {tensor.name: self._placed(tensor) for tensor in tensors}

    def _placed(self, tensor: Any) -> Value:  # noqa: ANN401  # a message declared at run time
        if not is_external(tensor):
            value = inline_tensor(tensor)
            return value.to(self._device) if is_data(value) else value
        blob, offset, length = place(tensor, self._blobs)
        return _value(tensor, self._mapping(blob), offset, length).to(self._device)

    def _mapping(self, blob: str) -> mmap.mmap:
        if blob not in self._mapped:
            with (self._folder / blob).open("rb") as file:
                self._mapped[blob] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped[blob]


def inline_tensor(tensor: Any) -> Value:  # noqa: ANN401  # a message declared at run time
    """A tensor whose elements stand in the graph itself.

    Raises:
        InvalidGraphError: It has fewer or more elements than its shape says.
        UnsupportedPackageError: An element type that is unknown here.
    """
    if tensor.raw_data or not nbytes(tensor):
        if len(tensor.raw_data) != nbytes(tensor):
            raise InvalidGraphError(
                f"tensor {tensor.name!r:.120} has {len(tensor.raw_data)} bytes, its shape "
                f"{list(tensor.dims)} needs {nbytes(tensor)}"
            )
        return _value(tensor, bytearray(tensor.raw_data), 0, len(tensor.raw_data))
    return _listed(tensor)


_LISTS: Mapping[int, str] = {1: "float_data", 7: "int64_data", 11: "double_data"}
"""Field of the elements by ONNX's number of their type; int32_data for all others that we read."""

_AS_INTEGERS = frozenset({2, 3, 5, 6, 9})


def _listed(tensor: Any) -> Tensor:  # noqa: ANN401  # see above
    kind = tensor.data_type
    if kind not in _LISTS and kind not in _AS_INTEGERS:
        raise UnsupportedPackageError(
            f"tensor {tensor.name!r:.120} lists elements of type {kind}, which is unknown here"
        )
    items = list(getattr(tensor, _LISTS.get(kind, "int32_data")))
    shape = tuple(int(n) for n in tensor.dims)
    if len(items) != torch.Size(shape).numel():
        raise InvalidGraphError(
            f"tensor {tensor.name!r:.120} has {len(items)} elements, its shape is {shape}"
        )
    return torch.tensor(items, dtype=TYPES[kind]).reshape(shape)


def _value(tensor: Any, data: mmap.mmap | bytearray, offset: int, length: int) -> Value:  # noqa: ANN401  # see above
    """A view of the bytes as the tensor's type and shape."""
    shape = tuple(int(n) for n in tensor.dims)
    kind = tensor.data_type
    if kind in (UINT4, INT4):
        return Nibbles(_view(data, torch.uint8, offset, length), shape, kind == INT4)
    if kind not in TYPES:
        raise UnsupportedPackageError(
            f"tensor {tensor.name!r:.120} has elements of type {kind}, unknown to the torch engine"
        )
    return _view(data, TYPES[kind], offset, length).reshape(shape)


def _view(data: mmap.mmap | bytearray, kind: torch.dtype, offset: int, length: int) -> Tensor:
    if not length:
        return torch.empty(0, dtype=kind)
    with warnings.catch_warnings():
        # The mapping is read-only, and so is all that is done with a constant.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(data, dtype=kind, count=length // kind.itemsize, offset=offset)
