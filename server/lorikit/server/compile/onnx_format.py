# SPDX-License-Identifier: Apache-2.0
"""Graphs <-> ONNX files."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lorikit.server.compile.graph import MICROSOFT, Array, Attribute, Graph, Node, Port, Shape

OPSET = 20
"""Opset of the graphs we write: the lowest that has Gelu; onnxruntime reads it from 1.17."""

IR_VERSION = 9
"""File format version we write; onnxruntime reads it from 1.15."""


def from_onnx(model: onnx.ModelProto) -> Graph:
    """Read a model whose tensors are in memory.

    Scopes come from the exporter's metadata; shapes of values come from ``value_info``.
    """
    graph = Graph()
    constants = {t.name: _array(t) for t in model.graph.initializer}
    graph.constants.update(constants)
    for info in model.graph.input:
        if info.name not in constants:
            graph.inputs.append(_port(info))
    for proto in model.graph.node:
        if proto.op_type == "Constant":
            graph.constants[proto.output[0]] = _array(helper.get_node_attr_value(proto, "value"))
            continue
        attributes = {a.name: _attribute(helper.get_attribute_value(a)) for a in proto.attribute}
        node = Node(
            proto.op_type,
            tuple(proto.input),
            tuple(proto.output),
            attributes,
            proto.domain if proto.domain != "ai.onnx" else "",
            _scope(proto),
        )
        graph.nodes.append(node)
    graph.outputs.extend(_port(info) for info in model.graph.output)
    for info in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if info.type.tensor_type.HasField("shape"):
            graph.shapes[info.name] = _shape(info)
    return graph


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """Write a graph; constants that live in a blob become external data named by its digest."""
    initializers = [_tensor(graph, name) for name in _used_constants(graph)]
    model = helper.make_model(
        helper.make_graph(
            [_node(node) for node in graph.nodes],
            "lorikit",
            [_value_info(port) for port in graph.inputs],
            [_value_info(port) for port in graph.outputs],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=IR_VERSION,
        producer_name="lorikit",
    )
    return model


def _node(node: Node) -> onnx.NodeProto:
    proto = helper.make_node(
        node.op, node.inputs, node.outputs, domain=node.domain, name=node.outputs[0]
    )
    for name, value in node.attributes.items():
        proto.attribute.append(helper.make_attribute(name, value))
    return proto


def _used_constants(graph: Graph) -> list[str]:
    used = {name for node in graph.nodes for name in node.inputs}
    used.update(port.name for port in graph.outputs)
    return [name for name in graph.constants if name in used]


def _tensor(graph: Graph, name: str) -> TensorProto:
    array = graph.constants[name]
    place = graph.external.get(name)
    if place is None:
        return numpy_helper.from_array(np.asarray(array, order="C"), name)
    tensor = TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    facts = {"location": place.blob, "offset": place.offset, "length": place.length}
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _array(tensor: TensorProto) -> Array:
    return numpy_helper.to_array(tensor)


def _attribute(value: Any) -> Attribute:  # noqa: ANN401  # whatever ONNX stores
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, float, str)):
        return value
    return tuple(value)


def _scope(proto: onnx.NodeProto) -> str:
    for entry in proto.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            names = [name.strip(" '\"") for name in entry.value.strip("[]").split(",")]
            return names[-2] if len(names) > 1 else ""
    return ""


def _shape(info: onnx.ValueInfoProto) -> Shape:
    dims = info.type.tensor_type.shape.dim
    return tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in dims)


def _port(info: onnx.ValueInfoProto) -> Port:
    dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    return Port(info.name, dtype, _shape(info))


def _value_info(port: Port) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(port.dtype)
    return helper.make_tensor_value_info(port.name, dtype, port.shape)
