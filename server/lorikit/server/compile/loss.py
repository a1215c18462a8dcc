# SPDX-License-Identifier: Apache-2.0
"""Losses, compiled into the graph together with their gradient at the logits."""

from __future__ import annotations

import numpy as np

from lorikit.server.compile.graph import Graph, Node, Port


def add_classification_loss(graph: Graph) -> str:
    """Append weighted cross-entropy to a forward graph with the output ``logits``.

    Adds the inputs ``labels`` int64 [batch] and ``weights`` float32 [batch], and the outputs
    ``loss`` = sum_i w_i * (-log softmax(logits_i)[label_i]) and ``correct`` = number of rows with
    w_i > 0 whose largest logit is their label, both float32 []. A step's micro-batches sum, since
    the caller's weights sum to 1 over the whole step.

    Returns:
        Name of the gradient of ``loss`` at the logits: w_i * (softmax(logits_i) - onehot(label_i)).
    """
    batch, classes = graph.shape("logits")
    graph.inputs.append(Port("labels", np.dtype(np.int64), (batch,)))
    graph.inputs.append(Port("weights", np.dtype(np.float32), (batch,)))
    rows = (batch, 1)

    log_probabilities = graph.emit("LogSoftmax", "logits", shape=(batch, classes), axis=-1)
    index = graph.emit("Unsqueeze", "labels", graph.ints(1), shape=rows)
    weight = graph.emit("Unsqueeze", "weights", graph.ints(1), shape=rows)
    picked = graph.emit("GatherElements", log_probabilities, index, shape=rows, axis=1)
    weighted = graph.emit("Mul", picked, weight, shape=rows)
    total = graph.emit("ReduceSum", weighted, shape=(), keepdims=0)
    _output(graph, graph.emit("Neg", total, shape=()), "loss")

    guess = graph.emit("ArgMax", "logits", shape=(batch,), axis=1, keepdims=0)
    hit = graph.emit("Equal", guess, "labels", shape=(batch,))
    counted = graph.emit("Greater", "weights", graph.floats(0.0), shape=(batch,))
    both = graph.emit("And", hit, counted, shape=(batch,))
    hits = graph.emit("Cast", both, shape=(batch,), to=1)
    _output(graph, graph.emit("ReduceSum", hits, shape=(), keepdims=0), "correct")

    probabilities = graph.emit("Exp", log_probabilities, shape=(batch, classes))
    depth = graph.constant([classes], np.int64, "ints")
    ends = graph.constant([0.0, 1.0], np.float32, "off_on")
    one_hot = graph.emit("OneHot", "labels", depth, ends, shape=(batch, classes), axis=1)
    difference = graph.emit("Sub", probabilities, one_hot, shape=(batch, classes))
    return graph.emit("Mul", difference, weight, shape=(batch, classes))


def _output(graph: Graph, value: str, name: str) -> None:
    """Let a scalar value leave the graph under a name of its own."""
    graph.nodes.append(Node("Identity", (value,), (name,)))
    graph.shapes[name] = ()
    graph.outputs.append(Port(name, np.dtype(np.float32), ()))
