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
from lorikit.server.compile.graph import MICROSOFT, Graph, Node, Port
from lorikit.server.errors import UnsupportedModelError
from lorikit.server.methods.base_delta import DELTA_RANK, delta_tensors

_TRANSPOSED = {"transA": 0, "transB": 1, "alpha": 1.0}


def deltas_of(adapter: Sequence[AdapterTensor]) -> tuple[AdapterTensor, ...]:
    """The tensors that hold a change of each LoRA module, module by module."""
    b = {t.module: t for t in adapter if t.role == "lora_B"}
    factors = (a for a in adapter if a.role == "lora_A")
    return tuple(delta for a in factors for delta in delta_tensors(a, b[a.module]))


def add_base_deltas(graph: Graph, adapter: Sequence[AdapterTensor]) -> None:
    """Add the change of every LoRA module to what its LoRA adds, in place.

    To run on a forward graph whose LoRA branches are ``FusedMatMul`` alone, as ``fuse_linear``
    leaves them, before ``add_dropout``: a change sees the whole input. Adds the inputs
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
        tensor = places.get(node.inputs[1]) if node.op == "FusedMatMul" else None
        if tensor is None:
            continue
        x = _input_of(producers, node, pairs[tensor.module])
        _add_product(graph, node, x, tensor.module, is_new=tensor.name not in found)
        found.add(tensor.name)
    if missing := sorted(set(places) - found):
        raise _not_linear(missing[0])


def _input_of(producers: Mapping[str, Node], second: Node, weight: str) -> str:
    """What the first factor of a LoRA branch reads, from the node of its second factor."""
    node = producers.get(second.inputs[0])
    while node is not None and node.op == "Mul":
        node = next((producers[name] for name in node.inputs if name in producers), None)
    if node is None or node.op != "FusedMatMul" or node.inputs[1] != weight:
        raise _not_linear(weight)
    return node.inputs[0]


def _not_linear(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is no factor of a linear map here, so that its base cannot be changed beside it; "
        "use a method that needs no base deltas, such as fedit"
    )


def _add_product(graph: Graph, node: Node, x: str, module: str, *, is_new: bool) -> None:
    """Let what reads a LoRA branch read the sum of the branch and the change."""
    branch, factor = node.outputs[0], node.inputs[1]
    shape, width = graph.shape(branch), graph.shape(x)[-1]
    rank = f"{DELTA_RANK}@{module}"
    a, b = f"{module}.base_delta_A", f"{module}.base_delta_B"
    if is_new:
        for name, form in ((a, (rank, width)), (b, (graph.shape(factor)[0], rank))):
            graph.inputs.append(Port(name, np.dtype(np.float32), form))
            graph.shapes[name] = form
    hidden, product, total = (graph.fresh(f"{module}.base_delta") for _ in range(3))
    graph.shapes |= {hidden: (*shape[:-1], rank), product: shape, total: shape}
    graph.replace_uses(branch, total)
    place = graph.nodes.index(node) + 1
    graph.nodes[place:place] = [
        Node("FusedMatMul", (x, a), (hidden,), dict(_TRANSPOSED), MICROSOFT, module),
        Node("FusedMatMul", (hidden, b), (product,), dict(_TRANSPOSED), MICROSOFT, module),
        Node("Add", (branch, product), (total,), scope=module),
    ]
