# SPDX-License-Identifier: Apache-2.0
"""Images with a class each, kept as bytes and scaled when they are drawn."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import ImageInput, Task
from lorikit.sdk._data.base import Dataset, Indices
from lorikit.sdk._data.rows import Classes, Row, columns
from lorikit.sdk._errors import DataError, EngineUnavailableError
from lorikit.sdk.engines.base import Batch

Pixels = npt.NDArray[np.uint8]
"""[height, width, channels]."""


class PillowImage(Protocol):
    """What is needed of ``PIL.Image.Image``."""

    def convert(self, mode: str) -> Any:  # noqa: ANN401  # an array in Pillow's own way
        """The image in another mode."""


Image = npt.NDArray[Any] | str | Path | PillowImage
"""An image as an app may give it."""


class ClassifiedImages(Dataset):
    """Resized images with their classes, one byte a pixel and channel."""

    max_length = 0

    def __init__(self, rows: Iterable[Row], task: Task, image: ImageInput) -> None:
        """Read and resize all images.

        Args:
            rows: Mappings with the task's columns, or pairs (image, label). An image is a uint8
                array [height, width, 3], or [height, width] in grey; a float array [3, height,
                width] from 0 to 1; a Pillow image; or the path of a file that Pillow reads.
            task: Column names and class names.
            image: What the model reads.

        Raises:
            DataError: A row does not fit; the message names the row (from 0).
            EngineUnavailableError: A file is given, and ``pillow`` is not installed.
        """
        classes = Classes(task)
        flat, labels = bytearray(), array("q")
        for number, row in enumerate(rows):
            value, label = columns(number, row, (task.image_column, task.label_column), "image")
            labels.append(classes.number(number, label))
            flat.extend(fitted(_pixels(number, value, len(image.mean)), image).tobytes())
        shape = (len(labels), image.height, image.width, len(image.mean))
        self._pixels = np.frombuffer(flat, np.uint8).reshape(shape)
        self._labels: Indices = np.array(labels, dtype=np.int64)
        self._scale = np.float32(1 / 255) / np.asarray(image.std, np.float32)
        self._shift = np.asarray(image.mean, np.float32) / np.asarray(image.std, np.float32)
        self.lengths = np.ones(len(labels), np.int64)

    @classmethod
    def to_predict(
        cls, images: Sequence[object], task: Task, image: ImageInput
    ) -> ClassifiedImages:
        """Images to predict on; their labels are all 0 and mean nothing."""
        return cls(((each, 0) for each in images), task, image)

    @property
    def labels(self) -> Indices:
        """Class per example, [examples]."""
        return self._labels

    def counted(self, draws: npt.ArrayLike) -> Indices:
        """One label an example."""
        return np.ones(np.shape(draws), np.int64)

    def batch(
        self, draws: npt.ArrayLike, weights: npt.ArrayLike = 1.0, *, seed: Sequence[int] = (0,)
    ) -> Batch:
        """See ``Dataset.batch``; labels and weights are [batch]."""
        chosen = np.asarray(draws, np.int64) % len(self)
        values = self._pixels[chosen] * self._scale - self._shift
        return Batch(
            inputs={"pixel_values": np.ascontiguousarray(values.transpose(0, 3, 1, 2))},
            labels=self._labels[chosen],
            weights=np.broadcast_to(np.asarray(weights, np.float32), chosen.shape).copy(),
        )


def fitted(pixels: Pixels, image: ImageInput) -> Pixels:
    """Resize an image as the model wants it, and cut out its centre if it wants that."""
    height, width = pixels.shape[:2]
    if not image.shortest_edge:
        return resized(pixels, image.height, image.width)
    short = min(height, width)
    pixels = resized(
        pixels, height * image.shortest_edge // short, width * image.shortest_edge // short
    )
    top = (pixels.shape[0] - image.height) // 2
    left = (pixels.shape[1] - image.width) // 2
    return pixels[top : top + image.height, left : left + image.width]


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize with a bilinear filter that widens when an image shrinks, as Pillow's does.

    Rows and columns are each one product with a matrix of filter weights; like Pillow it works
    along the width first and rounds to bytes in between. Values differ from Pillow's by 1 at most.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    across = np.einsum("oi,hic->hoc", _filter(pixels.shape[1], width), pixels, optimize=True)
    along = np.einsum(
        "oi,iwc->owc", _filter(pixels.shape[0], height), _bytes(across), optimize=True
    )
    return _bytes(along)


def _filter(old: int, new: int) -> npt.NDArray[np.float32]:
    """Weights of a triangle filter, [new, old]; each row sums to 1."""
    scale = old / new
    support = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    result: npt.NDArray[np.float32] = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return result


def _bytes(values: npt.NDArray[np.floating[Any]]) -> Pixels:
    rounded: Pixels = np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)
    return rounded


def _pixels(number: int, value: object, channels: int) -> Pixels:
    """Any image a row may hold, as bytes with the model's number of channels."""
    if isinstance(value, str | Path):
        value = _opened(number, value)
    if not isinstance(value, np.ndarray) and hasattr(value, "convert"):
        value = np.asarray(value.convert("RGB" if channels == 3 else "L"))
    if not isinstance(value, np.ndarray):
        raise DataError(
            f"row {number}: the image is of type {type(value).__name__}; give a uint8 array "
            "[height, width, 3], a float array [3, height, width], a Pillow image, or a path"
        )
    if value.dtype == np.uint8:
        pixels = value[:, :, None] if value.ndim == 2 else value
    elif np.issubdtype(value.dtype, np.floating) and value.ndim == 3:
        pixels = _from_floats(number, value)
    else:
        raise DataError(f"row {number}: the image is a {value.dtype} array of shape {value.shape}")
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise DataError(
            f"row {number}: the image has shape {value.shape}; bytes come as [height, width, 3], "
            "floats as [3, height, width]"
        )
    return _with_channels(pixels, channels)


def _from_floats(number: int, value: npt.NDArray[Any]) -> Pixels:
    low, high = (float(value.min()), float(value.max())) if value.size else (0.0, 0.0)
    if not 0 <= low <= high <= 1:
        raise DataError(
            f"row {number}: pixels of a float image lie between 0 and 1, got {low:g} to {high:g}; "
            "leave the scaling to the SDK"
        )
    return _bytes(value.transpose(1, 2, 0) * 255.0)


def _with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Grey from colour by the weights of ITU-R 601, as Pillow does, or colour from grey."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    grey: npt.NDArray[np.float64] = pixels @ np.array([0.299, 0.587, 0.114])
    return _bytes(grey)[:, :, None]


def _opened(number: int, path: str | Path) -> object:
    try:
        module: Any = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise EngineUnavailableError(
            "reading image files needs Pillow: pip install pillow; or give arrays"
        ) from error
    try:
        with module.open(path) as image:
            pixels: object = image.convert("RGB")
    except OSError as error:
        raise DataError(f"row {number}: image {str(path)!r} cannot be read: {error}") from error
    return pixels
