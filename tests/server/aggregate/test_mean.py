# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.server.aggregate.mean import HolderMean


def f32(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


def test_weights_are_normalised_over_those_who_sent_the_tensor() -> None:
    mean = HolderMean({"both": (2,), "one": (2,), "none": (2,)})
    mean.add("both", f32([1, 2]), 1)
    mean.add("both", f32([5, 10]), 3)
    mean.add("one", f32([7, 8]), 3)

    result = mean.finish({"both": f32([0, 0]), "one": f32([0, 0]), "none": f32([9, 9])})

    assert result["both"].tolist() == [(1 + 3 * 5) / 4, (2 + 3 * 10) / 4]
    assert result["one"].tolist() == [7, 8]
    assert result["none"].tolist() == [9, 9]


def test_a_leading_block_counts_only_where_it_is_held() -> None:
    mean = HolderMean({"w": (2, 2)})
    mean.add("w", f32([[1, 1], [1, 1]]), 1)
    mean.add("w", f32([[3]]), 1, index=(slice(0, 1), slice(0, 1)))

    assert mean.finish({"w": f32(np.zeros((2, 2)))})["w"].tolist() == [[2, 1], [1, 1]]


def test_a_mask_lists_the_held_entries_in_order() -> None:
    mean = HolderMean({"w": (2, 2)})
    mean.add("w", f32([4, 6]), 2, index=np.array([[True, False], [False, True]]))

    assert mean.finish({"w": f32([[0, 1], [2, 3]])})["w"].tolist() == [[4, 1], [2, 6]]


def test_rows_are_averaged_over_the_devices_that_have_the_class() -> None:
    mean = HolderMean({"head": (3, 2)})
    mean.add("head", f32([[1, 1], [3, 3]]), 1, index=np.array([0, 2]))
    mean.add("head", f32([[5, 5]]), 1, index=np.array([2]))

    assert mean.finish({"head": f32(np.zeros((3, 2)))})["head"].tolist() == [[1, 1], [0, 0], [4, 4]]


def test_whole_tensors_and_parts_mix_in_any_order() -> None:
    part, whole = f32([6.0]), f32([2.0, 2.0])
    one, other = HolderMean({"w": (2,)}), HolderMean({"w": (2,)})
    one.add("w", part, 1, index=(slice(0, 1),))
    one.add("w", whole, 1)
    other.add("w", whole, 1)
    other.add("w", part, 1, index=(slice(0, 1),))

    assert one.finish({"w": whole})["w"].tolist() == [4, 2]
    assert other.finish({"w": whole})["w"].tolist() == [4, 2]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(1e-6, 1e6))
def test_one_holder_gets_its_values_back_exactly(value: float, weight: float) -> None:
    mean = HolderMean({"w": (1,)})
    mean.add("w", f32([value]), weight)

    assert mean.finish({"w": f32([0])})["w"][0] == np.float32(value)


def test_sums_do_not_lose_small_values_beside_large_ones() -> None:
    mean = HolderMean({"w": (1,)})
    for value in (1e8, *([1.0] * 8), -1e8):
        mean.add("w", f32([value]), 1)

    assert mean.finish({"w": f32([0])})["w"][0] == np.float32(0.8)


def test_holders_of_weight_zero_change_nothing() -> None:
    mean = HolderMean({"w": (1,)})
    mean.add("w", f32([5]), 0)

    assert mean.finish({"w": f32([3])})["w"].tolist() == [3]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight must be finite"):
        HolderMean({"w": (1,)}).add("w", f32([1]), weight)


def test_names_shapes_and_repeated_ids_are_checked() -> None:
    mean = HolderMean({"w": (2, 2)})
    with pytest.raises(ValueError, match="v: not one of the tensors"):
        mean.add("v", f32([1]), 1)
    with pytest.raises(ValueError, match=r"w: shape \(1, 2\) does not fill \(2, 2\)"):
        mean.add("w", f32([[1, 2]]), 1)
    with pytest.raises(ValueError, match="w: an id stands twice"):
        mean.add("w", f32([[1, 2], [3, 4]]), 1, index=np.array([1, 1]))
