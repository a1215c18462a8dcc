# SPDX-License-Identifier: Apache-2.0
"""Changes of the base beside it: y = Q(W0) x + D_B (D_A x) + s B A x.

A federated method that folds what was learned into the base cannot write into a quantised weight.
Here each LoRA module gets two more inputs of the graph, which no gradient belongs to. Their rank is
a symbol of its own, so it may grow from round to round. The gradient with respect to x passes
through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorikit.proto.manifest import AdapterTensor
from lorikit.server.compile.graph import MICROSOFT, Dim, Graph, Node, Port
from lorikit.server.errors import UnsupportedModelError
from lorikit.server.methods.base_delta import DELTA_RANK, DELTA_SUFFIX, delta_tensors

_PRODUCTS = ("FusedMatMul", "Gemm")
"""What a linear map without a bias is in a graph; ``Gemm`` where there is no axis of tokens."""

_TRANSPOSED = {"transA": 0, "transB": 1, "alpha": 1.0}


def deltas_of(adapter: Sequence[AdapterTensor]) -> tuple[AdapterTensor, ...]:
    """The tensors that hold a change of each LoRA module, module by module."""
    b = {t.module: t for t in adapter if t.role == "lora_B"}
    factors = (a for a in adapter if a.role == "lora_A")
    return tuple(delta for a in factors for delta in delta_tensors(a, b[a.module]))


def add_base_deltas(graph: Graph, adapter: Sequence[AdapterTensor]) -> None:
    """Add the change of every LoRA module to what its LoRA adds, in place.

    To run on a forward graph before ``add_dropout``: a change sees the whole input. Adds the inputs
    ``<module>.base_delta_A`` [delta, d_in] and ``<module>.base_delta_B`` [d_out, delta], float32.

    Args:
        graph: Forward graph of all layers.
        adapter: Adapter tensors of the model.

    Raises:
        UnsupportedModelError: A factor is not that of a linear map; names it.
    """
    pairs = {t.module: t.name for t in adapter if t.role == "lora_A"}
    places = {t.name: t for t in adapter if t.role == "lora_B"}
    producers = graph.producers()
    found: set[str] = set()
    for node in list(graph.nodes):
        tensor = places.get(node.inputs[1]) if node.op in _PRODUCTS else None
        if tensor is None:
            continue
        x = _input_of(producers, node, pairs[tensor.module])
        if tensor.name not in found:
            _add_inputs(graph, tensor, graph.shape(x)[-1])
        _add_product(graph, _scaled(graph, node), x, tensor.module)
        found.add(tensor.name)
    if missing := sorted(set(places) - found):
        raise _not_linear(missing[0])


def _input_of(producers: Mapping[str, Node], second: Node, weight: str) -> str:
    """What the first factor of a LoRA branch reads, from the node of its second factor."""
    node = producers.get(second.inputs[0])
    while node is not None and node.op == "Mul":
        node = next((producers[name] for name in node.inputs if name in producers), None)
    if node is None or node.op not in _PRODUCTS or node.inputs[1] != weight:
        raise _not_linear(weight)
    return node.inputs[0]


def _not_linear(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is no factor of a linear map here, so that its base cannot be changed beside it; "
        "use a method that needs no base deltas, such as fedit"
    )


def _scaled(graph: Graph, second: Node) -> Node:
    """The node after which a LoRA branch is scaled, which may be its second factor's already."""
    branch = second.outputs[0]
    readers = (node for node in graph.nodes if node.op == "Mul" and branch in node.inputs)
    return next((node for node in readers if "lora_scale" in node.inputs), second)


def _add_inputs(graph: Graph, b: AdapterTensor, width: Dim) -> None:
    """Let a module's change be inputs of the graph; their rank is a symbol of the module's own."""
    rank = f"{DELTA_RANK}@{b.module}"
    for name, shape in zip(_names(b.module), ((rank, width), (b.shape[0], rank)), strict=True):
        graph.inputs.append(Port(name, np.dtype(np.float32), shape))
        graph.shapes[name] = shape


def _add_product(graph: Graph, node: Node, x: str, module: str) -> None:
    """Let what reads the result of a LoRA branch read the sum of it and the change."""
    branch = node.outputs[0]
    a, b = _names(module)
    shape, rank = graph.shape(branch), graph.shape(a)[0]
    hidden, product, total = (graph.fresh(f"{module}{DELTA_SUFFIX}") for _ in range(3))
    graph.shapes |= {hidden: (*shape[:-1], rank), product: shape, total: shape}
    graph.replace_uses(branch, total)
    place = graph.nodes.index(node) + 1
    graph.nodes[place:place] = [
        Node("FusedMatMul", (x, a), (hidden,), dict(_TRANSPOSED), MICROSOFT, module),
        Node("FusedMatMul", (hidden, b), (product,), dict(_TRANSPOSED), MICROSOFT, module),
        Node("Add", (branch, product), (total,), scope=module),
    ]


def _names(module: str) -> tuple[str, str]:
    return f"{module}{DELTA_SUFFIX}_A", f"{module}{DELTA_SUFFIX}_B"
