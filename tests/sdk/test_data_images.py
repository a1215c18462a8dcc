# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorikit.proto.manifest import ImageInput, Task
from lorikit.sdk._data import ClassifiedImages
from lorikit.sdk._data.images import resized
from lorikit.sdk._errors import DataError

TASK = Task(kind="image-classification", labels=("cat", "dog"))
SMALL = ImageInput(height=2, width=3, mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25))


def _pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_are_scaled_by_the_models_numbers() -> None:
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 1] = (255, 51, 102)

    batch = ClassifiedImages([(image, "dog")], TASK, SMALL).batch([0], 0.5)

    values = batch.inputs["pixel_values"]
    assert values.shape == (1, 3, 2, 3)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0, :, 0, 1], [1.0, 0.2, 0.6], rtol=1e-6)
    np.testing.assert_allclose(values[0, :, 1, 2], [-1.0, 0.0, -1.0], rtol=1e-6)
    np.testing.assert_array_equal(batch.labels, [1])
    np.testing.assert_array_equal(batch.weights, [0.5])


def test_bytes_floats_and_pillow_images_mean_the_same() -> None:
    image = _pixels(2, 3)
    rows: list[object] = [(image, 0), {"image": image.transpose(2, 0, 1) / 255, "label": "cat"}]
    pillow = pytest.importorskip("PIL.Image", reason="an app may use Pillow")
    rows.append((pillow.fromarray(image), 0))

    values = ClassifiedImages(rows, TASK, SMALL).batch(range(len(rows))).inputs["pixel_values"]  # type: ignore[arg-type]

    for other in values[1:]:
        np.testing.assert_array_equal(other, values[0])


def test_image_file_is_read(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="reading files needs Pillow")
    image = _pixels(2, 3)
    pillow.fromarray(image).save(tmp_path / "a.png")

    data = ClassifiedImages([(str(tmp_path / "a.png"), 0), (image, 0)], TASK, SMALL)

    values = data.batch([0, 1]).inputs["pixel_values"]
    np.testing.assert_array_equal(values[0], values[1])


def test_images_are_kept_as_bytes() -> None:
    data = ClassifiedImages([(_pixels(20, 30), 0)] * 4, TASK, SMALL)
    assert data._pixels.nbytes == 4 * 2 * 3 * 3
    np.testing.assert_array_equal(data.lengths, [1] * 4)


def test_grey_and_colour_are_turned_into_what_the_model_reads() -> None:
    grey = ImageInput(height=1, width=1, mean=(0.0,), std=(1.0,))
    colour = ImageInput(height=1, width=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    green = np.array([[[0, 100, 0]]], np.uint8)

    from_colour = ClassifiedImages([(green, 0)], TASK, grey).batch([0]).inputs["pixel_values"]
    from_grey = ClassifiedImages([(np.full((1, 1), 51, np.uint8), 0)], TASK, colour).batch([0])

    np.testing.assert_allclose(from_colour * 255, [[[[59]]]], rtol=1e-6)  # 0.587 x 100
    np.testing.assert_allclose(from_grey.inputs["pixel_values"][0, :, 0, 0], [0.2] * 3, rtol=1e-6)


def test_shrinking_to_half_takes_the_triangle_over_four_pixels() -> None:
    row = np.array([[[0], [40], [80], [120]]], np.uint8)

    # Centre 1 of the new pixel at 1.0 weighs 0.25, 0.75, 0.75, 0.25 of pixels -0.5 to 2.5;
    # the one outside does not count.
    expected = [(0.75 * 0 + 0.75 * 40 + 0.25 * 80) / 1.75, (0.25 * 40 + 0.75 * 200) / 1.75]
    np.testing.assert_array_equal(resized(row, 1, 2)[0, :, 0], np.rint(expected))


@pytest.mark.parametrize("size", [(7, 5), (40, 61), (24, 9), (96, 96)])
def test_resizing_is_that_of_pillow(size: tuple[int, int]) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="compares with Pillow")
    image = _pixels(33, 48)

    theirs = np.asarray(pillow.fromarray(image).resize(size[::-1], pillow.Resampling.BILINEAR))

    difference = resized(image, *size).astype(int) - theirs.astype(int)
    assert abs(difference).max() <= 1  # Pillow's weights are whole numbers of 22 bits


def test_centre_is_cut_out_after_the_shorter_side_fits() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 255  # the middle square
    spec = ImageInput(height=4, width=4, shortest_edge=4, mean=(0.0,) * 3, std=(1.0,) * 3)

    values = ClassifiedImages([(image, 0)], TASK, spec).batch([0]).inputs["pixel_values"]

    np.testing.assert_array_equal(values, np.ones((1, 3, 4, 4), np.float32))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (7, "row 1: the image is of type int; give a uint8 array"),
        (np.zeros((2, 2, 4), np.uint8), r"row 1: the image has shape \(2, 2, 4\)"),
        (np.zeros((2, 2, 2)), r"row 1: the image has shape \(2, 2, 2\)"),
        (np.zeros((2, 3), np.int32), "row 1: the image is a int32 array"),
        (np.full((3, 2, 2), 7.0), "row 1: pixels of a float image lie between 0 and 1"),
        (np.full((3, 2, 2), np.nan), "row 1: pixels of a float image lie between 0 and 1"),
        ("/nowhere.png", "row 1: image '/nowhere.png' cannot be read"),
    ],
)
def test_bad_image_is_named(image: object, message: str) -> None:
    if isinstance(image, str):
        pytest.importorskip("PIL.Image", reason="reading files needs Pillow")
    with pytest.raises(DataError, match=message):
        ClassifiedImages([(_pixels(2, 3), 0), (image, 0)], TASK, SMALL)  # type: ignore[list-item]
