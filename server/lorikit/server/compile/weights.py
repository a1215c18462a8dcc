# SPDX-License-Identifier: Apache-2.0
"""Frozen weights: the codec of each, one blob per layer and precision, how a graph reads them.

A graph never holds a de-quantised weight for longer than one use. Each use has its own
de-quantising nodes, placed right before it, so that forward and backward each pay the time and
neither keeps the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lorikit.proto.manifest import BlobRef, WeightTensor, digest_of
from lorikit.proto.tensors import Encoded, Float32
from lorikit.quantization import QuantizationError, codec
from lorikit.quantization.nf4 import LEVELS
from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.graph import MICROSOFT, Array, External, Graph, Node
from lorikit.server.errors import CompileError, UnsupportedModelError

PRECISIONS = ("nf4", "int8", "fp16", "fp32")
"""Precisions a base can have, the smallest first."""

ALIGNMENT = 64
"""Bytes to which each array in a blob is aligned."""

PAGE = 4096
"""Bytes to which arrays of a page or more are aligned, so that a runtime can map them."""

NF4_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """One frozen tensor as it lies in a blob."""

    encoded: Encoded
    blob: str
    places: Mapping[str, External]
    """Place of each part."""


@dataclass(frozen=True, slots=True)
class Base:
    """All frozen tensors of a model at one precision."""

    precision: str
    stored: Mapping[str, Stored]
    layer_blobs: Mapping[int, BlobRef]
    """Blob by layer; -1 holds what belongs to no layer."""

    def decoded(self, name: str) -> Float32:
        """The values a device computes with."""
        encoded = self.stored[name].encoded
        return codec(encoded.codec).decode(encoded)

    def manifest_entries(self, names: set[str]) -> tuple[WeightTensor, ...]:
        """Manifest rows of the named tensors."""
        return tuple(
            WeightTensor(
                name=name,
                codec=stored.encoded.codec,
                shape=stored.encoded.shape,
                nbytes=stored.encoded.nbytes,
                blob=stored.blob,
            )
            for name, stored in sorted(self.stored.items())
            if name in names
        )


def codec_for(name: str, values: Array, precision: str, *, is_table: bool) -> str:
    """Codec of one frozen tensor.

    Vectors stay fp32: they are small and quality hangs on them. Tables (embeddings) take at most 8
    bits in the small formats and never fewer, since a row is read as it is. A matrix whose size
    does not fill NF4's blocks takes 8 bits.
    """
    if precision not in PRECISIONS:
        raise CompileError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if values.ndim < 2 or precision == "fp32":
        return "fp32"
    if precision == "nf4" and (is_table or values.size % NF4_BLOCK):
        return "int8"
    return precision


def store_base(
    weights: Mapping[str, Array],
    tables: set[str],
    architecture: Architecture,
    precision: str,
    put: Callable[[bytes], BlobRef],
) -> Base:
    """Encode every frozen tensor and write one blob per layer.

    Args:
        weights: Frozen float32 tensors by name.
        tables: Names of those that are read row by row.
        architecture: Knows the layer of a name.
        precision: Of the base.
        put: Stores a blob.

    Raises:
        CompileError: A weight is not finite; the message names it.
    """
    by_layer: dict[int, list[str]] = {}
    for name in sorted(weights):
        by_layer.setdefault(architecture.layer_of(name), []).append(name)
    stored: dict[str, Stored] = {}
    blobs: dict[int, BlobRef] = {}
    for layer, names in sorted(by_layer.items()):
        encoded = {
            name: _encode(name, weights[name], precision, is_table=name in tables) for name in names
        }
        data, places = _lay_out(encoded)
        blob = digest_of(data)
        blobs[layer] = put(data)
        for name in names:
            where = {
                role: External(blob, offset, length)
                for role, (offset, length) in places[name].items()
            }
            stored[name] = Stored(encoded[name], blob, where)
    return Base(precision, stored, blobs)


def frozen_weights(graph: Graph, parameters: set[str]) -> tuple[dict[str, Array], set[str]]:
    """The frozen float tensors of a graph, and which of them are tables read by ``Gather``."""
    weights = {n: v for n, v in graph.constants.items() if n in parameters}
    tables = {n.inputs[0] for n in graph.nodes if n.op == "Gather" and n.inputs[0] in weights}
    return weights, tables


def read_weights(graph: Graph, base: Base, runtime: str) -> None:
    """Let every use of a frozen tensor read the base's blobs, in place.

    Args:
        graph: Graph whose frozen tensors are constants.
        base: Where they are stored, and how.
        runtime: ``onnx`` or ``onnx-training``.
    """
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        for position, name in enumerate(node.inputs):
            if name in base.stored:
                _read(graph, node, position, base.stored[name])
        graph.nodes.append(node)


def _encode(name: str, values: Array, precision: str, *, is_table: bool) -> Encoded:
    chosen = codec_for(name, values, precision, is_table=is_table)
    try:
        return codec(chosen).encode(np.asarray(values, np.float32))
    except QuantizationError as error:
        raise CompileError(f"{name} cannot be stored as {chosen}: {error}") from error


def _lay_out(
    tensors: Mapping[str, Encoded],
) -> tuple[bytes, dict[str, dict[str, tuple[int, int]]]]:
    """Join the parts of all tensors into one blob; return it and (offset, length) by part."""
    data = bytearray()
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for name, encoded in tensors.items():
        places[name] = {}
        for role in sorted(encoded.parts):
            raw = np.asarray(encoded.parts[role], order="C").tobytes()
            unit = PAGE if len(raw) >= PAGE else ALIGNMENT
            data.extend(bytes(-len(data) % unit))
            places[name][role] = (len(data), len(raw))
            data.extend(raw)
    return bytes(data), places


def _read(graph: Graph, node: Node, position: int, stored: Stored) -> None:
    """Replace one input of a node by nodes that read the stored tensor."""
    name = node.inputs[position]
    encoded = stored.encoded
    parts = {role: f"{name}/{encoded.codec}/{role}" for role in encoded.parts}
    for role, part in parts.items():
        graph.constants[part] = encoded.parts[role]
        graph.external[part] = stored.places[role]
    if node.op == "Gather" and position == 0:
        node.inputs = (_table_rows(graph, node, encoded, parts), *node.inputs[1:])
        if encoded.codec != "fp32":
            node.op, node.attributes, node.domain = "Identity", {}, ""
            node.inputs = node.inputs[:1]
        return
    if encoded.codec == "nf4" and node.op == "FusedMatMul" and node.attributes["transB"] == 1:
        _use_nf4_kernel(node, encoded, parts)
        return
    value = READERS[encoded.codec](graph, encoded, parts)
    inputs = list(node.inputs)
    inputs[position] = value
    node.inputs = tuple(inputs)


def _use_nf4_kernel(node: Node, encoded: Encoded, parts: Mapping[str, str]) -> None:
    """Multiply with the packed codes themselves: y = x W^T without a de-quantised W.

    The backward form of this kernel is wrong on CPUs for matrices that are not square, so
    gradients read the de-quantised weight instead.
    """
    rows, columns = encoded.shape
    node.op, node.domain = "MatMulBnb4", MICROSOFT
    node.inputs = (node.inputs[0], parts["codes"], parts["absmax"])
    node.attributes = {"K": columns, "N": rows, "block_size": NF4_BLOCK, "quant_type": 1}


def _table_rows(graph: Graph, node: Node, encoded: Encoded, parts: Mapping[str, str]) -> str:
    """Rows of a stored table: only the rows that are asked for are de-quantised."""
    if node.attributes.get("axis", 0) != 0:
        raise UnsupportedModelError(f"{node.scope}: a quantised table is read along axis 0 only")
    shape = graph.shape(node.outputs[0])
    index = node.inputs[1]
    if encoded.codec == "fp32":
        return parts["values"]
    if encoded.codec == "fp16":
        rows = graph.emit("Gather", parts["values"], index, shape=shape, axis=0)
        return graph.emit("Cast", rows, shape=shape, to=1)
    codes = graph.emit("Gather", parts["codes"], index, shape=shape, axis=0)
    values = graph.emit("Cast", codes, shape=shape, to=1)
    scale = graph.emit("Gather", parts["scale"], index, shape=shape[:-1], axis=0)
    column = graph.emit("Unsqueeze", scale, graph.ints(-1), shape=(*shape[:-1], 1))
    return graph.emit("Mul", values, column, shape=shape)


def _read_fp32(graph: Graph, encoded: Encoded, parts: Mapping[str, str]) -> str:
    return parts["values"]


def _read_fp16(graph: Graph, encoded: Encoded, parts: Mapping[str, str]) -> str:
    return graph.emit("Cast", parts["values"], shape=encoded.shape, hint="weight", to=1)


def _read_int8(graph: Graph, encoded: Encoded, parts: Mapping[str, str]) -> str:
    if len(encoded.shape) != 2:
        raise UnsupportedModelError(f"int8 weights must be matrices, got shape {encoded.shape}")
    return graph.emit(
        "DequantizeLinear",
        parts["codes"],
        parts["scale"],
        shape=encoded.shape,
        hint="weight",
        axis=0,
    )


def _read_nf4(graph: Graph, encoded: Encoded, parts: Mapping[str, str]) -> str:
    """De-quantise with a table of the 256 pairs of levels that a byte can stand for."""
    byte = np.arange(256)
    levels = np.asarray(LEVELS, np.float32)
    graph.constants.setdefault("nf4_pairs", np.stack([levels[byte >> 4], levels[byte & 15]], 1))
    size = int(np.prod(encoded.shape))
    index = graph.emit("Cast", parts["codes"], shape=(size // 2,), to=6)
    graph.dtypes[index] = np.dtype(np.int32)
    pairs = graph.emit("Gather", "nf4_pairs", index, shape=(size // 2, 2), axis=0)
    blocks = (size // NF4_BLOCK, NF4_BLOCK)
    grouped = graph.emit("Reshape", pairs, graph.ints(*blocks), shape=blocks)
    column = graph.emit("Unsqueeze", parts["absmax"], graph.ints(1), shape=(blocks[0], 1))
    scaled = graph.emit("Mul", grouped, column, shape=blocks)
    return graph.emit(
        "Reshape", scaled, graph.ints(*encoded.shape), shape=encoded.shape, hint="weight"
    )


READERS: Mapping[str, Callable[[Graph, Encoded, Mapping[str, str]], str]] = {
    "fp32": _read_fp32,
    "fp16": _read_fp16,
    "int8": _read_int8,
    "nf4": _read_nf4,
}
"""How a stored matrix becomes float32 in the graph, by codec."""
