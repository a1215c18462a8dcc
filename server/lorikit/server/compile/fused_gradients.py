# SPDX-License-Identifier: Apache-2.0
"""Gradient rules with the fused kernels that only onnxruntime-training has.

One kernel takes the place of four to fourteen elementwise nodes, so a step is shorter and holds
fewer values at a time. The kernels' signatures are those of onnxruntime's ``com.microsoft``
training operators.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorikit.server.compile.gradients import RULES, Rule, layer_norm_statistics
from lorikit.server.compile.graph import MICROSOFT, Graph, Node


def _softmax(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    y = node.outputs[0]
    axis = node.attributes.get("axis", -1)
    return [graph.emit("SoftmaxGrad_13", dy, y, shape=graph.shape(y), domain=MICROSOFT, axis=axis)]


def _gelu(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    if node.attributes.get("approximate", "none") != "none":
        return RULES["Gelu"](graph, node, dy, needs)
    x = node.inputs[0]
    return [graph.emit("GeluGrad", dy, x, shape=graph.shape(x), domain=MICROSOFT)]


def _layer_norm(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    x, weight = node.inputs[:2]
    mean, inverse = layer_norm_statistics(graph, node)
    gradients = tuple(graph.fresh(hint) for hint in ("grad", "scale_grad", "bias_grad"))
    inputs = (dy, x, weight, mean, inverse)
    attributes = {"axis": node.attributes.get("axis", -1)}
    graph.nodes.append(
        Node("LayerNormalizationGrad", inputs, gradients, attributes, domain=MICROSOFT)
    )
    graph.shapes[gradients[0]] = graph.shape(x)
    graph.shapes.update(dict.fromkeys(gradients[1:], graph.shape(weight)))
    return [g if need else None for g, need in zip(gradients, needs, strict=False)]


FUSED_RULES: dict[str, Rule] = {
    **RULES,
    "Gelu": _gelu,
    "LayerNormalization": _layer_norm,
    "Softmax": _softmax,
}
"""Gradient rule by operator for the runtime ``onnx-training``."""
