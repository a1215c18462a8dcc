# SPDX-License-Identifier: Apache-2.0
"""Reads ONNX files with protobuf alone, and checks that they stay within their package.

The ``onnx`` distribution is too heavy for a device. The few messages that matter are declared
here; fields that are not declared are skipped.

Source:
    Field numbers and types of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from lorikit.sdk._errors import InvalidGraphError

_PACKAGE = "lorikit.onnx"

_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "Entry": {"key": (1, "string"), "value": (2, "string")},
    "OperatorSet": {"domain": (1, "string"), "version": (2, "int64")},
    "Value": {"name": (1, "string")},
    "Tensor": {
        "dims": (1, "int64*"),
        "data_type": (2, "int32"),
        "float_data": (4, "float*"),
        "int32_data": (5, "int32*"),
        "int64_data": (7, "int64*"),
        "name": (8, "string"),
        "raw_data": (9, "bytes"),
        "double_data": (10, "double*"),
        "uint64_data": (11, "uint64*"),
        "external_data": (13, "Entry*"),
        "data_location": (14, "int32"),
    },
    "Attribute": {
        "name": (1, "string"),
        "f": (2, "float"),
        "i": (3, "int64"),
        "s": (4, "bytes"),
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "floats": (7, "float*"),
        "ints": (8, "int64*"),
        "strings": (9, "bytes*"),
        "tensors": (10, "Tensor*"),
        "graphs": (11, "Graph*"),
        "type": (20, "int32"),
    },
    "Node": {
        "input": (1, "string*"),
        "output": (2, "string*"),
        "name": (3, "string"),
        "op_type": (4, "string"),
        "attribute": (5, "Attribute*"),
        "domain": (7, "string"),
    },
    "SparseTensor": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Graph": {
        "node": (1, "Node*"),
        "initializer": (5, "Tensor*"),
        "input": (11, "Value*"),
        "output": (12, "Value*"),
        "sparse_initializer": (15, "SparseTensor*"),
    },
    "Function": {"name": (1, "string"), "node": (7, "Node*")},
    "Model": {
        "ir_version": (1, "int64"),
        "graph": (7, "Graph"),
        "opset_import": (8, "OperatorSet*"),
        "functions": (25, "Function*"),
    },
}
"""Fields by message: number and type, ``*`` for repeated ones."""

_EXTERNAL = 1
"""``data_location`` of a tensor whose bytes lie in another file."""

_BITS: Mapping[int, int] = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    21: 4, 22: 4,
}  # fmt: skip
"""Bits of an element by ONNX's number of its type."""


_NUMBERS_AND_TEXTS = frozenset({1, 2, 3, 6, 7, 8})
"""ONNX's numbers of the attribute types that hold neither tensors nor graphs."""


def read_model(path: Path) -> Any:  # noqa: ANN401  # a message that is declared at run time
    """The file's ``Model`` message.

    Raises:
        InvalidGraphError: The bytes are not an ONNX model.
    """
    try:
        model = _model_class().FromString(path.read_bytes())
    except DecodeError as error:
        raise InvalidGraphError(f"opening graph {path.name}: these bytes are no graph") from error
    if not model.graph.node:
        raise InvalidGraphError(f"opening graph {path.name}: it has no nodes")
    return model


def check_places(model: Any, blobs: Mapping[str, int]) -> None:  # noqa: ANN401  # as read_model
    """Check that all external data of a model lies within the package's weight blobs.

    A graph comes from the server; without this check it could have the runtime read any file.

    Args:
        model: From ``read_model``.
        blobs: Size in bytes by digest.

    Raises:
        InvalidGraphError: A tensor names another file, bytes past the end of its blob, or fewer
            or more bytes than its shape has; names the tensor.
    """
    for tensor in model.graph.initializer:
        if is_external(tensor):
            place(tensor, blobs)
    for tensor in _other_tensors(model):
        if is_external(tensor):
            raise InvalidGraphError(
                f"tensor {tensor.name!r:.120} has external data but is no initializer of the graph"
            )


def is_external(tensor: Any) -> bool:  # noqa: ANN401  # as read_model
    """Whether a tensor's bytes lie in another file."""
    return tensor.data_location == _EXTERNAL or len(tensor.external_data) > 0


def place(tensor: Any, blobs: Mapping[str, int]) -> tuple[str, int, int]:  # noqa: ANN401  # see above
    """Blob, offset and length in bytes of a tensor's external data.

    Raises:
        InvalidGraphError: They are not within a blob, or not what the shape needs.
    """
    facts = {entry.key: entry.value for entry in tensor.external_data}
    blob, name = facts.get("location", ""), f"tensor {tensor.name!r:.120}"
    if blob not in blobs:
        raise InvalidGraphError(f"{name} lies in {blob!r:.120}, which is no blob of the package")
    try:
        offset, length = (int(facts.get(key, "0")) for key in ("offset", "length"))
    except ValueError as error:
        raise InvalidGraphError(f"{name} has no whole numbers as place: {facts!r:.200}") from error
    if not 0 <= offset <= offset + length <= blobs[blob]:
        raise InvalidGraphError(
            f"{name} lies at bytes {offset}..{offset + length} of blob {blob}, which has "
            f"{blobs[blob]}"
        )
    if length != nbytes(tensor):
        raise InvalidGraphError(
            f"{name} has {length} bytes in blob {blob}, its shape {list(tensor.dims)} needs "
            f"{nbytes(tensor)}"
        )
    return blob, offset, length


def nbytes(tensor: Any) -> int:  # noqa: ANN401  # as read_model
    """Bytes that a tensor's shape and type take; 0 for a type of no fixed size."""
    return (math.prod(int(n) for n in tensor.dims) * _BITS.get(tensor.data_type, 0) + 7) // 8


def _other_tensors(model: Any) -> Iterator[Any]:  # noqa: ANN401  # as read_model
    """Every tensor of a model that is not an initializer of its graph."""
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(model.graph.node)


def _tensors_of_nodes(nodes: Any) -> Iterator[Any]:  # noqa: ANN401  # as read_model
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type in _NUMBERS_AND_TEXTS and not _holds_more(attribute):
                continue
            yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer
                for sparse in graph.sparse_initializer:
                    yield from (sparse.values, sparse.indices)
                yield from _tensors_of_nodes(graph.node)


def _holds_more(attribute: Any) -> bool:  # noqa: ANN401  # as read_model
    """Whether an attribute has a tensor or graph, whatever type it claims."""
    return bool(
        attribute.HasField("t") or attribute.HasField("g") or attribute.tensors or attribute.graphs
    )


@cache
def _model_class() -> Any:  # noqa: ANN401  # a class that is made at run time
    file = descriptor_pb2.FileDescriptorProto(
        name="lorikit/onnx.proto", package=_PACKAGE, syntax="proto3"
    )
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            _declare(declared.field.add(name=name, number=number), kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def _declare(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    """Set type and label of a field; a name that is no scalar type is one of our messages."""
    types = descriptor_pb2.FieldDescriptorProto
    single = kind.removesuffix("*")
    field.label = types.LABEL_OPTIONAL if single == kind else types.LABEL_REPEATED
    if single in _MESSAGES:
        field.type, field.type_name = types.TYPE_MESSAGE, f".{_PACKAGE}.{single}"
    else:
        field.type = types.Type.Value(f"TYPE_{single.upper()}")
