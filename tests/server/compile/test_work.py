# SPDX-License-Identifier: Apache-2.0
"""Operations of a forward graph counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lorikit.server.compile.architectures import ARCHITECTURES
from lorikit.server.compile.graph import Graph, Port
from lorikit.server.compile.work import LayerWork
from lorikit.server.planner.speed import OUTSIDE, Operations

BERT = ARCHITECTURES["bert", "sequence-classification"]
ROW = ("batch", "length", 4)


def layer_graph() -> Graph:
    """In layer 1: y = x W^T with a frozen W [6, 4], scores y y^T, and an Exp; outside, a Tanh."""
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), ROW)], shapes={"x": ROW})
    graph.constants["w"] = np.zeros((6, 4), np.float32)
    y = graph.emit("FusedMatMul", "x", "w", shape=("batch", "length", 6), transB=1)
    scores = graph.emit("FusedMatMul", y, y, shape=("batch", "length", "length"), transB=1)
    graph.emit("Exp", scores, shape=("batch", "length", "length"))
    for node in graph.nodes:
        node.scope = f"{BERT.layers}.1.attention"
    graph.emit("Tanh", "x", shape=ROW)
    return graph


@pytest.fixture
def work() -> LayerWork:
    return LayerWork(layer_graph(), {"w"}, BERT)


def test_work_of_a_layer_is_told_from_what_lies_outside(work: LayerWork) -> None:
    sizes = {"batch": 2, "length": 10, "rank": 8}

    assert work.operations([1], sizes) == Operations(
        weights=24, products=2 * 24 * 20, mixing=2 * 2 * 10 * 10 * 6, values=2 * 10 * 10
    )
    assert work.operations([OUTSIDE], sizes) == Operations(values=2 * 10 * 4)
    assert work.operations([0], sizes) == Operations()


def test_only_what_mixes_tokens_grows_with_the_square_of_the_length(work: LayerWork) -> None:
    short, long = (
        work.operations([1], {"batch": 1, "length": length, "rank": 8}) for length in (16, 32)
    )

    assert long.products == 2 * short.products
    assert long.mixing == 4 * short.mixing
    assert long.weights == short.weights


def test_tokens_of_a_text_are_its_length(work: LayerWork) -> None:
    assert work.tokens(77) == 77


def test_tokens_of_an_image_are_the_places_that_a_convolution_leaves() -> None:
    pixels, places = ("batch", 3, 32, 32), ("batch", 8, 4, 4)
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), pixels)], shapes={"x": pixels})
    graph.constants["kernel"] = np.zeros((8, 3, 8, 8), np.float32)
    graph.emit("Conv", "x", "kernel", shape=places)

    work = LayerWork(graph, {"kernel"}, BERT)

    assert work.tokens(128) == 16
    assert work.operations([OUTSIDE], {"batch": 2}).products == 2 * 2 * 8 * 16 * 3 * 8 * 8
