# SPDX-License-Identifier: Apache-2.0
"""Sub-models: keep some layers of the residual stream and drop the others.

Source: FedRA (Su et al. 2024, https://arxiv.org/abs/2311.11227): kept blocks stay in their
original order and the stream passes from one kept block to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.cleaning import remove_dead
from lorikit.server.compile.graph import Graph
from lorikit.server.errors import UnsupportedModelError


def keep_layers(graph: Graph, architecture: Architecture, kept: Sequence[int], count: int) -> None:
    """Remove every layer that is not in ``kept`` from a forward graph, in place.

    Args:
        graph: Forward graph with the layers' scopes.
        architecture: Knows which scope belongs to which layer.
        kept: Layers to keep, ascending, from 0.
        count: Layers of the full model.
    """
    check_kept(kept, count)
    for layer in reversed(range(count)):
        if layer not in kept:
            entry, result = stream_of(graph, architecture, layer)
            graph.replace_uses(result, entry)
    remove_dead(graph)
    inputs = {name for node in graph.nodes for name in node.inputs}
    graph.inputs = [
        port
        for port in graph.inputs
        if port.name in inputs or architecture.layer_of(port.name) not in range(count)
    ]


def check_kept(kept: Sequence[int], count: int) -> None:
    """Nothing for layers in their order; ``UnsupportedModelError`` for others."""
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= count:
        raise UnsupportedModelError(
            f"kept layers must be ascending and lie in 0..{count - 1}, got {list(kept)}"
        )


def stream_of(graph: Graph, architecture: Architecture, layer: int) -> tuple[str, str]:
    """Names of the hidden states that enter and leave a layer."""
    inside = [n for n in graph.nodes if architecture.layer_of(n.scope) == layer]
    made = {output for node in inside for output in node.outputs}
    outputs = {port.name for port in graph.outputs}
    readers = [n for n in graph.nodes if architecture.layer_of(n.scope) != layer]
    read = {name for node in readers for name in node.inputs} | outputs
    leaving = {name for name in made & read if _is_activation(graph, name)}
    if len(leaving) != 1:
        raise UnsupportedModelError(
            f"layer {layer} hands on {len(leaving)} values, a residual stream hands on one; "
            "sub-models are not possible for this architecture"
        )
    result = leaving.pop()
    shape = graph.shape(result)
    entering = [
        name
        for node in inside
        for name in node.inputs
        if name not in made
        and name not in graph.constants
        and name not in graph.input_names()
        and graph.shapes.get(name) == shape
    ]
    if len(set(entering)) != 1:
        raise UnsupportedModelError(
            f"layer {layer} reads {len(set(entering))} values of the stream's shape {shape}; "
            "sub-models are not possible for this architecture"
        )
    return entering[0], result


def _is_activation(graph: Graph, name: str) -> bool:
    """Whether a value is data; what is left are lengths, which layers compute once and share."""
    return len(graph.shape(name)) > 1
