# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import INPUTS, build_tiny_package, example_rows

from lorikit.proto.plan import OPERATIONS, Operation
from lorikit.proto.tensors import Tensors
from lorikit.sdk._data import Dataset, read_dataset
from lorikit.sdk._errors import PlanRefusedError
from lorikit.sdk._operations import (
    FINAL_OPERATIONS,
    GRADIENT_OPERATIONS,
    build,
    operation_names,
)
from lorikit.sdk._operations._tail import tail_score, tail_start
from lorikit.sdk._operations.base import Result, Work
from lorikit.sdk._operations.class_sums import COUNTS, MOMENTS, SUMS, ClassSums
from lorikit.sdk._operations.prune_tail import PruneTail
from lorikit.sdk._operations.tail_penalty import TailPenalty
from lorikit.sdk.engines import open_engine

PAIRS = (("q.A", "q.B"), ("v.A", "v.B"))


def _adapter(rank: int, rng: np.random.Generator) -> Tensors:
    return {
        "q.A": rng.standard_normal((rank, 6), dtype=np.float32),
        "q.B": rng.standard_normal((4, rank), dtype=np.float32),
        "v.A": rng.standard_normal((rank, 5), dtype=np.float32),
        "v.B": rng.standard_normal((3, rank), dtype=np.float32),
    }


def _pruned(operation: PruneTail, received: Tensors, adapter: Tensors) -> Result:
    return operation.run(
        Work(
            received=received,
            adapter=adapter,
            pairs=PAIRS,
            engine=None,  # type: ignore[arg-type]  # pruning looks at adapters alone
            data=None,  # type: ignore[arg-type]  # as above
            classes=1,
            inputs={},
            seed=0,
            check_cancelled=lambda: None,
        )
    )


def test_vocabulary_is_that_of_the_contract() -> None:
    assert set(operation_names()) == {f"{name}@{version}" for name, version in OPERATIONS.items()}


def test_tail_starts_at_the_floor_of_the_kept_share() -> None:
    assert [tail_start(rank, 0.99) for rank in (2, 50, 100)] == [1, 49, 99]
    assert tail_start(8, 0.5) == 4
    assert tail_start(8, 1.0) == 8
    assert tail_start(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996 in floating point


def test_score_is_the_product_of_the_tails_norms() -> None:
    adapter = {
        "q.A": np.array([[9.0, 9.0], [3.0, 4.0]], np.float32),
        "q.B": np.array([[9.0, 2.0]], np.float32),
    }
    assert tail_score(adapter, PAIRS[:1], 1) == pytest.approx(2 * 5)


def test_penalty_of_a_single_tail_is_worked_out_by_hand() -> None:
    adapter = {
        "q.A": np.array([[9.0, 9.0], [3.0, 4.0]], np.float32),
        "q.B": np.array([[9.0, 2.0]], np.float32),
    }

    value, gradient = TailPenalty(weight=0.1, keep=0.5, min_rank=1).term(adapter, PAIRS[:1])

    # 0.1 * ||B tail|| * ||A tail|| = 0.1 * 2 * 5; d/dA = 0.1 * 2 * A / 5, d/dB = 0.1 * 5 * B / 2.
    assert value == pytest.approx(1.0)
    np.testing.assert_allclose(gradient["q.A"], [[0, 0], [0.12, 0.16]], rtol=1e-6)
    np.testing.assert_allclose(gradient["q.B"], [[0, 0.5]], rtol=1e-6)


def test_gradient_of_the_penalty_is_its_slope(rng: np.random.Generator) -> None:
    adapter = {name: value.astype(np.float64) for name, value in _adapter(4, rng).items()}
    penalty = TailPenalty(weight=0.7, keep=0.6, min_rank=1)

    _, gradient = penalty.term(adapter, PAIRS)  # type: ignore[arg-type]  # float64 for the slope

    for name, value in adapter.items():
        slope = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            moved = {**adapter, name: value.copy()}
            moved[name][index] += 1e-6
            up = penalty.term(moved, PAIRS)[0]  # type: ignore[arg-type]
            moved[name][index] -= 2e-6
            slope[index] = (up - penalty.term(moved, PAIRS)[0]) / 2e-6  # type: ignore[arg-type]
        # The factor is rounded to float32, and the difference quotient loses half the digits.
        np.testing.assert_allclose(gradient[name], slope, rtol=1e-6, atol=1e-8)


def test_penalty_has_a_finite_gradient_where_the_tail_is_zero(rng: np.random.Generator) -> None:
    adapter = _adapter(4, rng)
    adapter["q.B"][:] = 0

    value, gradient = TailPenalty(weight=1.0, keep=0.5, min_rank=1).term(adapter, PAIRS)

    assert math.isfinite(value)
    assert all(np.isfinite(each).all() for each in gradient.values())
    assert not gradient["q.B"].any()


def test_penalty_is_dropped_at_the_lowest_rank(rng: np.random.Generator) -> None:
    assert TailPenalty(weight=1.0, keep=0.5, min_rank=4).term(_adapter(4, rng), PAIRS) == (0.0, {})


def test_fallen_score_drops_the_tail_of_every_module(rng: np.random.Generator) -> None:
    received = _adapter(8, rng)
    adapter = {name: value * np.float32(0.9) for name, value in received.items()}

    pruned = _pruned(PruneTail(keep=0.75, min_rank=2), received, adapter).adapter

    for name, value in adapter.items():
        kept = value[:6] if name.endswith("A") else value[:, :6]
        np.testing.assert_array_equal(pruned[name], kept)


def test_equal_score_prunes_nothing(rng: np.random.Generator) -> None:
    received = _adapter(8, rng)
    assert _pruned(PruneTail(keep=0.5, min_rank=1), received, received).adapter is received


def test_first_round_never_prunes(rng: np.random.Generator) -> None:
    received = _adapter(8, rng)
    received["q.B"][:] = received["v.B"][:] = 0  # as every LoRA starts: score 0 before training
    adapter = _adapter(8, rng)
    assert _pruned(PruneTail(keep=0.5, min_rank=1), received, adapter).adapter is adapter


@pytest.mark.parametrize(("rank", "kept"), [(8, 6), (6, 6), (5, 5)])
def test_pruning_stops_at_the_lowest_rank(rank: int, kept: int, rng: np.random.Generator) -> None:
    received = _adapter(rank, rng)
    adapter = {name: value * np.float32(0.5) for name, value in received.items()}
    pruned = _pruned(PruneTail(keep=0.5, min_rank=6), received, adapter).adapter
    assert pruned["q.A"].shape == (kept, 6)
    assert pruned["v.B"].shape == (3, kept)


def test_modules_of_different_ranks_are_refused(rng: np.random.Generator) -> None:
    adapter = {**_adapter(4, rng), "q.A": np.zeros((3, 6), np.float32)}
    with pytest.raises(ValueError, match=r"one rank common to all modules, found \[3, 4\]"):
        PruneTail(keep=0.5, min_rank=1).check(adapter, PAIRS)


def _class_sums(folder: Path, operation: ClassSums) -> tuple[Result, Dataset, np.ndarray]:
    package = build_tiny_package(folder)
    tokenizer = (folder / package.manifest.tokenizer.digest).read_bytes()
    data = read_dataset(example_rows(11), package.manifest, tokenizer, 16)
    adapter = package.adapter()
    engine = open_engine("onnx", package.manifest, folder, threads=1)
    result = operation.run(
        Work(
            received=adapter,
            adapter=adapter,
            pairs=(),
            engine=engine,
            data=data,
            classes=3,
            inputs=INPUTS,
            seed=1,
            check_cancelled=lambda: None,
        )
    )
    features = np.concatenate([package.features(adapter, data.batch([n])) for n in range(11)])
    return result, data, features


def test_class_sums_add_the_features_of_each_class(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="features need the onnx engine")
    result, data, features = _class_sums(tmp_path, ClassSums())

    expected = np.stack([features[data.labels == label].sum(0) for label in range(3)])
    np.testing.assert_allclose(result.produced[SUMS], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.produced[COUNTS], [4, 4, 3])


def test_class_sums_add_outer_products_where_asked(tmp_path: Path) -> None:
    result, _, features = _class_sums(tmp_path, ClassSums(second_moments=True))

    precise = features.astype(np.float64)
    np.testing.assert_allclose(result.produced[MOMENTS], precise.T @ precise, rtol=1e-5)


def test_class_sums_look_at_no_more_examples_than_asked(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="features need the onnx engine")
    result, *_ = _class_sums(tmp_path, ClassSums(max_examples=5))
    assert result.produced[COUNTS].sum() == 5


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Operation(name="melt"), "operation melt@1 is unknown here .*update the app"),
        (Operation(name="prune_tail", version=2), "prune_tail@2 is unknown here"),
        (Operation(name="tail_penalty"), "tail_penalty@1 is unknown here"),
        (Operation(name="prune_tail", arguments={"keep": 0.9}), "min_rank"),
        (
            Operation(name="prune_tail", arguments={"keep": 0.9, "min_rank": 1, "depth": 2}),
            "has no argument 'depth'",
        ),
        (Operation(name="prune_tail", arguments={"keep": 0.9, "min_rank": 1.5}), "must be int"),
        (Operation(name="prune_tail", arguments={"keep": "x", "min_rank": 1}), "must be float"),
        (Operation(name="prune_tail", arguments={"keep": 1.5, "min_rank": 1}), "got 1.5"),
        (Operation(name="class_sums", arguments={"max_examples": -1}), "at least 0, got -1"),
        (Operation(name="class_sums", arguments={"max_examples": True}), "must be int"),
    ],
)
def test_bad_operation_is_refused_by_name(operation: Operation, message: str) -> None:
    with pytest.raises(PlanRefusedError, match=message):
        build(operation, FINAL_OPERATIONS)


def test_whole_numbers_do_for_fractions() -> None:
    operation = Operation(name="tail_penalty", arguments={"weight": 0, "keep": 1, "min_rank": 1})
    assert build(operation, GRADIENT_OPERATIONS) == TailPenalty(weight=0, keep=1, min_rank=1)
