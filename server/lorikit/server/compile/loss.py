# SPDX-License-Identifier: Apache-2.0
"""Losses, compiled into the graph together with their gradient.

Every kind of task has the same loss: sum_i w_i * (-log softmax(logits_i)[label_i]), where i runs
over examples or over the tokens of all examples. A step's micro-batches sum, since the caller's
weights sum to 1 over the whole step. Labels lie in 0..classes - 1 everywhere, also where the weight
is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorikit.server.compile.graph import Dim, Graph, Node, Port, Shape
from lorikit.server.compile.slices import row_ranges, row_slice
from lorikit.server.errors import UnsupportedModelError

HEAD_SLICE_BYTES = 8 << 20
"""De-quantised bytes of the rows of a language-model head that are in memory at a time."""

HEAD_SLICE_ROWS = 2048
"""Most classes of which logits are in memory at a time."""


def add_loss(graph: Graph, logits: str = "logits") -> str:
    """Append weighted cross-entropy of whole logits and its gradient to a forward graph.

    Adds the inputs ``labels`` int64 and ``weights`` float32, both [batch] for logits
    [batch, classes] and [batch, length] for logits [batch, length, classes]; and the outputs
    ``loss`` and ``correct`` = number of rows with w_i > 0 whose largest logit is their label, both
    float32 [].

    Returns:
        Name of the gradient of ``loss`` at the logits: w_i * (softmax(logits_i) - onehot(label_i)).
    """
    shape = graph.shape(logits)
    rows, column = shape[:-1], (*shape[:-1], 1)
    _add_targets(graph, rows)
    guess = graph.emit("ArgMax", logits, shape=rows, axis=-1, keepdims=0)
    _count_correct(graph, guess, "labels", "weights", rows)
    log_probabilities = graph.emit("LogSoftmax", logits, shape=shape, axis=-1)
    index = graph.emit("Unsqueeze", "labels", graph.ints(-1), shape=column)
    weight = graph.emit("Unsqueeze", "weights", graph.ints(-1), shape=column)
    picked = graph.emit("GatherElements", log_probabilities, index, shape=column, axis=-1)
    minus_weight = graph.emit("Neg", weight, shape=column)
    weighted = graph.emit("Mul", picked, minus_weight, shape=column)
    _output(graph, graph.emit("ReduceSum", weighted, shape=(), keepdims=0), "loss")

    probabilities = graph.emit("Exp", log_probabilities, shape=shape)
    scaled = graph.emit("Mul", probabilities, weight, shape=shape)
    return graph.emit(
        "ScatterElements", scaled, index, minus_weight, shape=shape, axis=-1, reduction="add"
    )


@dataclass(frozen=True, slots=True)
class _Running:
    """What is known of each row's logits after some slices of the vocabulary; all [rows, 1]."""

    largest: str
    guess: str
    """Index of the largest logit."""
    total: str
    """Sum of exp(logit - largest)."""
    pull: str
    """Sum of exp(logit - largest) times the logit's row of the head, [rows, width]."""


def add_vocabulary_loss(
    graph: Graph,
    hidden: str,
    weight: str,
    bias: str | None = None,
    *,
    slice_bytes: int = HEAD_SLICE_BYTES,
) -> str:
    """Append the loss of a frozen language-model head; the logits of all classes never exist.

    The head is taken slice by slice of its rows (classes). A slice is de-quantised once: its logits
    update the running log-sum-exp of each row, and their exponentials times the slice update the
    running gradient, both rescaled where a larger logit appears. So there is no second pass, and
    memory holds one slice of the head, one slice of the logits and the gradient.

    Adds inputs and outputs as ``add_loss`` does; ``hidden`` may have any rank above 1, and labels
    and weights have its axes but the last.

    Args:
        graph: Forward graph; logits that nothing else needs fall away with dead code.
        hidden: Final hidden states [batch, length, width].
        weight: Constant with the head, float32 [classes, width]; it may be the embedding.
        bias: Constant float32 [classes], or None.
        slice_bytes: Float32 bytes of a slice of the head; a slice has at most ``HEAD_SLICE_ROWS``.

    Returns:
        Name of the gradient of ``loss`` at ``hidden``.

    Source:
        Log-sum-exp with a running maximum as in Milakov and Gimelshein 2018,
        https://arxiv.org/abs/1805.02867; rescaled sums as in Dao et al. 2022,
        https://arxiv.org/abs/2205.14135, with the head in the place of the values.
    """
    shape = graph.shape(hidden)
    classes, width = (int(n) for n in graph.shape(weight))
    if shape[-1] != width:
        raise UnsupportedModelError(
            f"the head reads {width} values a row, {hidden} has {shape[-1]}"
        )
    _add_targets(graph, shape[:-1])
    rows: Dim = "rows" if len(shape) > 2 else shape[0]
    flat = graph.emit("Reshape", hidden, graph.ints(-1, width), shape=(rows, width))
    labels = graph.emit("Reshape", "labels", graph.ints(-1, 1), shape=(rows, 1))
    graph.dtypes[labels] = np.dtype(np.int64)
    weights = graph.emit("Reshape", "weights", graph.ints(-1, 1), shape=(rows, 1))

    state: _Running | None = None
    most = max(1, min(slice_bytes // (4 * width), HEAD_SLICE_ROWS))
    for start, stop in row_ranges(classes, most):
        state = _next_slice(graph, flat, weight, bias, (start, stop), state)
    assert state is not None
    label_row, label_logit = _label_logit(graph, flat, labels, weight, bias)

    spread = graph.emit("Log", state.total, shape=(rows, 1))
    normaliser = graph.emit("Add", spread, state.largest, shape=(rows, 1))
    surprise = graph.emit("Sub", normaliser, label_logit, shape=(rows, 1))
    weighted = graph.emit("Mul", surprise, weights, shape=(rows, 1))
    _output(graph, graph.emit("ReduceSum", weighted, shape=(), keepdims=0), "loss")
    _count_correct(graph, state.guess, labels, weights, (rows, 1))

    mean = graph.emit("Div", state.pull, state.total, shape=(rows, width))
    difference = graph.emit("Sub", mean, label_row, shape=(rows, width))
    scaled = graph.emit("Mul", difference, weights, shape=(rows, width))
    lengths = graph.emit("Shape", hidden, shape=(len(shape),))
    return graph.emit("Reshape", scaled, lengths, shape=shape)


def _next_slice(
    graph: Graph,
    flat: str,
    weight: str,
    bias: str | None,
    bounds: tuple[int, int],
    before: _Running | None,
) -> _Running:
    """Take the logits of classes ``bounds`` into account."""
    start, stop = bounds
    rows, width = graph.shape(flat)
    column: Shape = (rows, 1)
    block: Shape = (rows, stop - start)
    piece = row_slice(graph, weight, start, stop)
    offsets = () if bias is None else (row_slice(graph, bias, start, stop),)
    logits = graph.emit("Gemm", flat, piece, *offsets, shape=block, transB=1)
    largest = graph.emit("ReduceMax", logits, graph.ints(-1), shape=column, keepdims=1)
    local = graph.emit("ArgMax", logits, shape=column, axis=-1, keepdims=1)
    first = graph.constant(start, np.int64, "int")
    guess = graph.emit("Add", local, first, shape=column)
    for name in (local, guess):
        graph.dtypes[name] = np.dtype(np.int64)
    if before is not None:
        is_larger = graph.emit("Greater", largest, before.largest, shape=column)
        guess = graph.emit("Where", is_larger, guess, before.guess, shape=column)
        graph.dtypes |= {is_larger: np.dtype(np.bool_), guess: np.dtype(np.int64)}
        largest = graph.emit("Max", largest, before.largest, shape=column)
    shifted = graph.emit("Sub", logits, largest, shape=block)
    shares = graph.emit("Exp", shifted, shape=block)
    total = graph.emit("ReduceSum", shares, graph.ints(-1), shape=column, keepdims=1)
    if before is None:
        return _Running(
            largest, guess, total, graph.emit("Gemm", shares, piece, shape=(rows, width))
        )
    fall = graph.emit("Sub", before.largest, largest, shape=column)
    factor = graph.emit("Exp", fall, shape=column)
    old_total = graph.emit("Mul", before.total, factor, shape=column)
    total = graph.emit("Add", old_total, total, shape=column)
    old_pull = graph.emit("Mul", before.pull, factor, shape=(rows, width))
    pull = graph.emit("Gemm", shares, piece, old_pull, shape=(rows, width))
    return _Running(largest, guess, total, pull)


def _label_logit(
    graph: Graph, flat: str, labels: str, weight: str, bias: str | None
) -> tuple[str, str]:
    """The label's row of the head, [rows, width], and its logit, [rows, 1]."""
    rows, width = graph.shape(flat)
    index = graph.emit("Squeeze", labels, graph.ints(-1), shape=(rows,))
    graph.dtypes[index] = np.dtype(np.int64)
    row = graph.emit("Gather", weight, index, shape=(rows, width), axis=0)
    product = graph.emit("Mul", row, flat, shape=(rows, width))
    logit = graph.emit("ReduceSum", product, graph.ints(-1), shape=(rows, 1), keepdims=1)
    if bias is None:
        return row, logit
    offset = graph.emit("Gather", bias, labels, shape=(rows, 1), axis=0)
    return row, graph.emit("Add", logit, offset, shape=(rows, 1))


def _add_targets(graph: Graph, rows: Shape) -> None:
    graph.inputs.append(Port("labels", np.dtype(np.int64), rows))
    graph.inputs.append(Port("weights", np.dtype(np.float32), rows))
    graph.shapes |= {"labels": rows, "weights": rows}


def _count_correct(graph: Graph, guess: str, labels: str, weights: str, shape: Shape) -> None:
    """Output ``correct``: rows that count and whose guess is the label."""
    hit = graph.emit("Equal", guess, labels, shape=shape)
    counted = graph.emit("Greater", weights, graph.floats(0.0), shape=shape)
    both = graph.emit("And", hit, counted, shape=shape)
    hits = graph.emit("Cast", both, shape=shape, to=1)
    graph.dtypes |= {guess: np.dtype(np.int64)}
    graph.dtypes |= dict.fromkeys((hit, counted, both), np.dtype(np.bool_))
    _output(graph, graph.emit("ReduceSum", hits, shape=(), keepdims=0), "correct")


def _output(graph: Graph, value: str, name: str) -> None:
    """Let a scalar value leave the graph under a name of its own."""
    graph.nodes.append(Node("Identity", (value,), (name,)))
    graph.shapes[name] = ()
    graph.outputs.append(Port(name, np.dtype(np.float32), ()))
