# SPDX-License-Identifier: Apache-2.0
"""Frozen weights as they are stored: the codec of each, one blob per layer and precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lorikit.proto.manifest import BlobRef, WeightTensor, digest_of
from lorikit.proto.tensors import Encoded, Float32
from lorikit.quantization import QuantizationError, codec
from lorikit.server.compile.architectures import Architecture
from lorikit.server.compile.graph import Array, External, Graph
from lorikit.server.errors import CompileError

PRECISIONS = ("int4", "nf4", "int8", "fp16", "fp32")
"""Precisions a base can have, the smallest first."""

ALIGNMENT = 64
"""Bytes to which each array in a blob is aligned."""

PAGE = 4096
"""Bytes to which arrays of a page or more are aligned, so that a runtime can map them."""

NF4_BLOCK = 64
"""Values of the flattened tensor that share a scale in NF4."""

INT4_BLOCKS = {"int4-row64": 64, "int4-row128": 128}
"""Values of a row that share a scale, by codec of int4."""

INT8_BLOCKS = {"int8-row64": 64, "int8-row128": 128}
"""The same by codec of the matrices of a progressive int8 base."""

WIDE_ROW = 2048
"""Values from which on a row takes int4 in blocks of 128. The scales of blocks of 64 are a ninth of
the bytes, 60 MB at 1.1 B parameters; halving them costs about 1 dB."""

_BEHIND_HEAD = frozenset({"Add", "Cast", "Identity", "Reshape", "Slice"})
"""Operators that may stand between a head and the logits."""


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

    Vectors stay fp32: they are small and quality hangs on them. Tables (embeddings, heads over a
    vocabulary) take 8 bits in the small formats and never fewer. Convolution kernels take fp16:
    they have no long rows that could share a scale. A matrix whose size does not fill NF4's
    blocks, or whose rows do not fill int4's, takes 8 bits.
    """
    if precision not in PRECISIONS:
        raise CompileError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if values.ndim < 2 or precision == "fp32":
        return "fp32"
    if values.ndim > 2:
        return "fp16"
    if precision == "nf4" and (is_table or values.size % NF4_BLOCK):
        return "int8"
    if precision == "int4":
        return "int8" if is_table else _int4_codec(values.shape[1])
    return precision


def _int4_codec(columns: int) -> str:
    """Codec of a matrix at int4 by the length of its rows, which have to fill its blocks."""
    if columns >= WIDE_ROW and columns % 128 == 0:
        return "int4-row128"
    return "int8" if columns % 64 else "int4-row64"


def store_base(
    weights: Mapping[str, Array],
    tables: set[str],
    architecture: Architecture,
    precision: str,
    put: Callable[[bytes], BlobRef],
    *,
    encode_matrix: Callable[[Float32, str, str], Encoded] | None = None,
) -> Base:
    """Encode every frozen tensor and write one blob per layer.

    Args:
        weights: Frozen float32 tensors by name.
        tables: Names of those that are read row by row.
        architecture: Knows the layer of a name.
        precision: Of the base.
        put: Stores a blob.
        encode_matrix: Takes a matrix whose rows fill int4's blocks, the codec it has at int4, and
            the precision int4 or int8; None for the codecs of these precisions.

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
            name: _encode(name, weights[name], precision, encode_matrix, is_table=name in tables)
            for name in names
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


def frozen_weights(
    graph: Graph, parameters: set[str], logits: str = "logits"
) -> tuple[dict[str, Array], set[str]]:
    """The frozen float tensors of a graph, and which of them are tables.

    Args:
        graph: Forward graph.
        parameters: Names of the model's parameters.
        logits: Value whose frozen linear map is a head over a vocabulary.

    Returns:
        The tensors by name, and the names of those that are read by ``Gather`` or give the logits.
    """
    weights = {n: v for n, v in graph.constants.items() if n in parameters}
    tables = {n.inputs[0] for n in graph.nodes if n.op == "Gather" and n.inputs[0] in weights}
    return weights, tables | _heads(graph, logits, weights)


def _heads(graph: Graph, logits: str, weights: Mapping[str, Array]) -> set[str]:
    """Matrices whose product is the logits."""
    producers = graph.producers()
    node = producers.get(logits)
    while node is not None and node.op in _BEHIND_HEAD:
        node = next((producers[name] for name in node.inputs if name in producers), None)
    if node is None or node.op not in ("FusedMatMul", "Gemm"):
        return set()
    return {node.inputs[1]} & set(weights)


def _encode(
    name: str,
    values: Array,
    precision: str,
    encode_matrix: Callable[[Float32, str, str], Encoded] | None,
    *,
    is_table: bool,
) -> Encoded:
    chosen = codec_for(name, values, precision, is_table=is_table)
    small = codec_for(name, values, "int4", is_table=is_table)
    try:
        if encode_matrix is not None and precision in ("int4", "int8") and small in INT4_BLOCKS:
            return encode_matrix(np.asarray(values, np.float32), small, precision)
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
