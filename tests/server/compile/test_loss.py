# SPDX-License-Identifier: Apache-2.0
"""Losses and their gradients against numpy in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime
import pytest

from lorikit.server.compile.graph import Graph, Port
from lorikit.server.compile.loss import add_loss, add_vocabulary_loss
from lorikit.server.compile.memory import peak_memory
from lorikit.server.compile.onnx_format import to_onnx
from lorikit.server.errors import UnsupportedModelError

F32 = np.dtype(np.float32)


def run(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def reference(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """Loss, correct and the gradient at the logits, float64."""
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    hot = np.eye(exact.shape[-1])[labels]
    loss = -(weights * (log_p * hot).sum(-1)).sum()
    correct = ((exact.argmax(-1) == labels) & (weights > 0)).sum()
    return float(loss), float(correct), weights[..., None] * (np.exp(log_p) - hot)


def batch_of(rows: tuple[int, ...], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and weights that sum to 1 and are 0 for the last row."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1, rows).astype(np.float32)
    weights.reshape(-1)[-1] = 0
    return rng.integers(0, classes, rows), weights / weights.sum()


def with_output(graph: Graph, name: str) -> Graph:
    graph.outputs.append(Port(name, F32, graph.shape(name)))
    return graph


@pytest.mark.parametrize("rows", [("batch",), ("batch", "length")])
def test_loss_and_gradient_of_whole_logits(rows: tuple[str, ...]) -> None:
    graph = Graph(inputs=[Port("logits", F32, (*rows, 5))], shapes={"logits": (*rows, 5)})
    gradient = add_loss(graph)
    sizes = (3, 4)[: len(rows)]
    labels, weights = batch_of(sizes, 5, seed=1)
    logits = np.random.default_rng(2).normal(0, 3, (*sizes, 5)).astype(np.float32)
    loss, correct, expected = reference(logits, labels, weights)

    found = run(
        with_output(graph, gradient), {"logits": logits, "labels": labels, "weights": weights}
    )

    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["correct"] == correct
    np.testing.assert_allclose(found[gradient], expected, atol=1e-7)


def head_graph(
    classes: int, width: int, slice_rows: int, *, with_bias: bool = False, seed: int = 3
) -> tuple[Graph, str, np.ndarray, np.ndarray]:
    """A graph of nothing but the head; its gradient, the head and its bias."""
    rng = np.random.default_rng(seed)
    head = rng.normal(size=(classes, width)).astype(np.float32)
    bias = rng.normal(size=classes).astype(np.float32) * with_bias
    graph = Graph(
        inputs=[Port("hidden", F32, ("batch", "length", width))],
        shapes={"hidden": ("batch", "length", width)},
        constants={"head": head, "bias": bias},
    )
    gradient = add_vocabulary_loss(
        graph,
        "hidden",
        "head",
        "bias" if with_bias else None,
        slice_bytes=4 * width * slice_rows,
    )
    return with_output(graph, gradient), gradient, head, bias


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("slice_rows", [1, 7, 16, 53, 54, 100])
def test_the_sliced_head_equals_the_plain_loss(slice_rows: int, with_bias: bool) -> None:
    graph, gradient, head, bias = head_graph(53, 8, slice_rows, with_bias=with_bias)
    labels, weights = batch_of((2, 5), 53, seed=4)
    hidden = np.random.default_rng(5).normal(size=(2, 5, 8)).astype(np.float32)
    loss, correct, at_logits = reference(
        hidden.astype(np.float64) @ head.T.astype(np.float64) + bias, labels, weights
    )

    found = run(graph, {"hidden": hidden, "labels": labels, "weights": weights})

    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["correct"] == correct
    np.testing.assert_allclose(found[gradient], at_logits @ head, atol=1e-6)


def test_the_guess_is_found_in_whichever_slice_it_lies() -> None:
    graph, _, head, _ = head_graph(53, 8, 7)
    hidden = np.random.default_rng(6).normal(size=(4, 9, 8)).astype(np.float32)
    labels = (hidden @ head.T).argmax(-1)
    assert len(set(labels.reshape(-1) // 7)) > 4
    weights = np.full((4, 9), 1 / 36, np.float32)

    found = run(graph, {"hidden": hidden, "labels": labels, "weights": weights})

    assert found["correct"] == 36


def test_logits_that_would_overflow_alone_do_not() -> None:
    graph, gradient, head, _ = head_graph(53, 8, 10)
    hidden = 200 * np.random.default_rng(7).normal(size=(1, 3, 8)).astype(np.float32)
    labels, weights = batch_of((1, 3), 53, seed=8)
    loss, _, at_logits = reference(hidden.astype(np.float64) @ head.T, labels, weights)

    found = run(graph, {"hidden": hidden, "labels": labels, "weights": weights})

    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(found[gradient], at_logits @ head, atol=1e-5)


def test_memory_holds_one_slice_of_the_logits_not_all() -> None:
    classes, width, rows = 32000, 64, 128
    graph = head_graph(classes, width, 1000)[0]

    peak = peak_memory(graph, {"batch": 1, "length": rows}).live_bytes

    # A slice of the logits twice (as it is made anew), three values of the hidden states' size,
    # and some columns; whole logits are 16 MB.
    assert peak <= 4 * rows * (2 * 1000 + 3 * width + 16)


def test_a_head_of_another_width_is_refused() -> None:
    graph = Graph(
        inputs=[Port("hidden", F32, ("batch", "length", 6))],
        shapes={"hidden": ("batch", "length", 6)},
        constants={"head": np.ones((10, 8), np.float32)},
    )

    with pytest.raises(UnsupportedModelError, match="reads 8 values a row, hidden has 6"):
        add_vocabulary_loss(graph, "hidden", "head")
