# SPDX-License-Identifier: Apache-2.0
"""Operators that turn stored codes into float32 values, by codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorikit.server.compile.base import INT4_BLOCKS, INT8_BLOCKS, NF4_BLOCK, Stored
from lorikit.server.compile.graph import MICROSOFT, External, Graph, Node, Shape
from lorikit.server.errors import CompileError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a stored tensor, or all of them."""

    name: str
    stored: Stored
    start: int
    stop: int
    is_cut: bool = False
    """Whether the rows are cut out of the whole tensor at run time, because the graph maps the
    whole tensor anyway: pages that are mapped twice count twice."""

    @staticmethod
    def whole(name: str, stored: Stored) -> Piece:
        """All rows of a tensor; a scalar has one."""
        return Piece(name, stored, 0, (stored.encoded.shape or (1,))[0])

    @property
    def codec(self) -> str:
        """Name of the tensor's codec."""
        return self.stored.encoded.codec

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        shape = self.stored.encoded.shape
        return (self.stop - self.start, *shape[1:]) if shape else ()

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    def rows(self, start: int, stop: int) -> Piece:
        """Other rows of the same tensor."""
        return replace(self, start=start, stop=stop)

    def part(self, graph: Graph, role: str, *shape: int) -> str:
        """Name of the value that holds the rows' share of a part, in the given shape.

        Raises:
            CompileError: The rows begin or end within a block.
        """
        values, place = self.stored.encoded.parts[role], self.stored.places[role]
        rows = (self.stored.encoded.shape or (1,))[0]
        first, last = (values.size * row / rows for row in (self.start, self.stop))
        if not (first.is_integer() and last.is_integer()):
            raise CompileError(
                f"{self.name}: rows {self.start} to {self.stop} of {rows} cut through a block of "
                f"{self.codec}; choose rows whose values fill its blocks"
            )
        begin, end = int(first), int(last)
        if self.is_cut and (begin, end) != (0, values.size):
            lengths = (shape[0] * values.size // (end - begin), *shape[1:])
            whole = replace(self, start=0, stop=rows).part(graph, role, *lengths)
            bounds = (bound * lengths[0] // values.size for bound in (begin, end))
            cut = graph.emit(
                "Slice", whole, *(graph.ints(bound) for bound in (*bounds, 0)), shape=shape
            )
            graph.dtypes[cut] = values.dtype
            return cut
        name = f"{self.name}[{self.start}:{self.stop}]/{self.codec}/{role}/{len(shape)}"
        graph.constants[name] = values.reshape(-1)[begin:end].reshape(shape)
        width = values.dtype.itemsize
        offset, length = place.offset + begin * width, (end - begin) * width
        graph.external[name] = External(place.blob, offset, length)
        return name


@dataclass(frozen=True, slots=True)
class Reader:
    """How tensors of one codec are read."""

    kernel: str
    """Operator that reads the codes; ``mapped`` where values are read as they lie."""
    read: Callable[[Graph, Piece], str]
    """Emits nodes that make the values; returns their name."""
    multiply: Callable[[str, Piece, Graph], Node] | None = None
    """Node, yet without outputs, that gives y = x W^T from the codes themselves."""
    takes_pieces: bool = True
    """Whether ``multiply`` gains by taking a large matrix piece by piece."""


def readers_for(runtime: str, *, is_fast: bool) -> Mapping[str, Reader]:
    """Reader by codec for a runtime; fast ones may keep a second copy of weights."""
    if runtime == "onnx-training":
        return READERS | dict.fromkeys(INT4_BLOCKS, Reader("Gather", _int4_by_table))
    if is_fast:
        int4 = replace(_INT4, multiply=_multiply_int4, takes_pieces=False)
        return READERS | dict.fromkeys(INT4_BLOCKS, int4)
    return READERS


def gather_rows(graph: Graph, node: Node, piece: Piece) -> str:
    """Turn a ``Gather`` of a table's rows into one that de-quantises only these rows.

    Returns:
        The operator that reads the codes.

    Raises:
        UnsupportedModelError: Another axis, or a codec whose blocks do not end with a row.
    """
    if node.attributes.get("axis", 0) != 0:
        raise UnsupportedModelError(f"{node.scope}: a quantised table is read along axis 0 only")
    if piece.codec == "fp32":
        node.inputs = (_mapped(graph, piece), *node.inputs[1:])
        return "mapped"
    if piece.codec not in _TABLE_ROWS:
        raise UnsupportedModelError(
            f"{piece.name}: rows of a table in {piece.codec} cannot be read one by one; "
            "store it as int8"
        )
    kernel, read = _TABLE_ROWS[piece.codec]
    made = read(graph, node.inputs[1], piece, graph.shape(node.outputs[0]))
    node.op, node.domain, node.inputs, node.attributes = "Identity", "", (made,), {}
    return kernel


def _mapped(graph: Graph, piece: Piece) -> str:
    return piece.part(graph, "values", *piece.shape)


def _half(graph: Graph, piece: Piece) -> str:
    values = piece.part(graph, "values", *piece.shape)
    return graph.emit("Cast", values, shape=piece.shape, hint="weight", to=1)


def _int8(graph: Graph, piece: Piece) -> str:
    if len(piece.shape) != 2:
        raise UnsupportedModelError(f"int8 weights must be matrices, got shape {piece.shape}")
    codes = piece.part(graph, "codes", *piece.shape)
    scale = piece.part(graph, "scale", piece.shape[0])
    return graph.emit("DequantizeLinear", codes, scale, shape=piece.shape, hint="weight", axis=0)


def _int8_blocks(graph: Graph, piece: Piece) -> str:
    """De-quantise with every block as a row of its own; the codes are stored beyond zero."""
    block = INT8_BLOCKS[piece.codec]
    blocks = piece.size // block
    codes = piece.part(graph, "codes", blocks, block)
    scale = piece.part(graph, "scale", blocks)
    zero = graph.constants.setdefault(f"zeros/{blocks}", np.full(blocks, 128, np.uint8))
    values = graph.emit(
        "DequantizeLinear", codes, scale, f"zeros/{len(zero)}", shape=(blocks, block), axis=0
    )
    return graph.emit("Reshape", values, graph.ints(*piece.shape), shape=piece.shape, hint="weight")


def _int4(graph: Graph, piece: Piece) -> str:
    rows = graph.constants.setdefault(f"rows/{piece.shape[0]}", np.arange(piece.shape[0]))
    return _int4_rows(graph, f"rows/{len(rows)}", piece, piece.shape)


def _int4_rows(graph: Graph, index: str, piece: Piece, shape: Shape) -> str:
    rows, columns = piece.shape
    block = INT4_BLOCKS[piece.codec]
    codes = piece.part(graph, "codes", rows, columns // 2)
    scale = piece.part(graph, "scale", rows, columns // block)
    return graph.emit(
        "GatherBlockQuantized",
        codes,
        index,
        scale,
        shape=shape,
        hint="weight",
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=block,
    )


def _int4_by_table(graph: Graph, piece: Piece) -> str:
    """Pairs of codes from a table of all bytes, times their block's scale."""
    byte = np.arange(256)
    pairs = np.stack([byte & 15, byte >> 4], axis=1).astype(np.float32) - np.float32(8)
    graph.constants.setdefault("int4_pairs", pairs)
    half = INT4_BLOCKS[piece.codec] // 2
    blocks = piece.size // (2 * half)
    codes = piece.part(graph, "codes", blocks, half)
    index = graph.emit("Cast", codes, shape=(blocks, half), to=6)
    graph.dtypes[index] = np.dtype(np.int32)
    found = graph.emit("Gather", "int4_pairs", index, shape=(blocks, half, 2), axis=0)
    scale = piece.part(graph, "scale", blocks, 1, 1)
    scaled = graph.emit("Mul", found, scale, shape=(blocks, half, 2))
    return graph.emit("Reshape", scaled, graph.ints(*piece.shape), shape=piece.shape, hint="weight")


def _nf4(graph: Graph, piece: Piece) -> str:
    """De-quantise with the kernel that multiplies: each value as a row of its own, times one.

    That kernel looks the levels up with several threads and needs no table in the graph.
    """
    one = graph.constant([[1.0]], np.float32, "one")
    node = _bnb4(one, piece, graph, rows=piece.size, columns=1)
    node.outputs = (graph.fresh("values"),)
    graph.nodes.append(node)
    graph.shapes[node.outputs[0]] = (1, piece.size)
    return graph.emit(
        "Reshape", node.outputs[0], graph.ints(*piece.shape), shape=piece.shape, hint="weight"
    )


def _multiply_nf4(x: str, piece: Piece, graph: Graph) -> Node:
    rows, columns = piece.shape
    return _bnb4(x, piece, graph, rows=rows, columns=columns)


def _bnb4(x: str, piece: Piece, graph: Graph, *, rows: int, columns: int) -> Node:
    codes = piece.part(graph, "codes", piece.size // 2)
    absmax = piece.part(graph, "absmax", piece.size // NF4_BLOCK)
    attributes = {"K": columns, "N": rows, "block_size": NF4_BLOCK, "quant_type": 1}
    return Node("MatMulBnb4", (x, codes, absmax), (), attributes, MICROSOFT)


def _multiply_int4(x: str, piece: Piece, graph: Graph) -> Node:
    rows, columns = piece.shape
    block = INT4_BLOCKS[piece.codec]
    blocks = columns // block
    codes = piece.part(graph, "codes", rows, blocks, block // 2)
    scale = piece.part(graph, "scale", rows, blocks)
    attributes = {"K": columns, "N": rows, "block_size": block, "bits": 4}
    return Node("MatMulNBits", (x, codes, scale), (), attributes, MICROSOFT)


def _half_rows(graph: Graph, index: str, piece: Piece, shape: Shape) -> str:
    values = piece.part(graph, "values", *piece.shape)
    rows = graph.emit("Gather", values, index, shape=shape, axis=0)
    graph.dtypes[rows] = np.dtype(np.float16)
    return graph.emit("Cast", rows, shape=shape, to=1)


def _int8_rows(graph: Graph, index: str, piece: Piece, shape: Shape) -> str:
    stored_codes = piece.part(graph, "codes", *piece.shape)
    codes = graph.emit("Gather", stored_codes, index, shape=shape, axis=0)
    graph.dtypes[codes] = np.dtype(np.int8)
    values = graph.emit("Cast", codes, shape=shape, to=1)
    stored_scale = piece.part(graph, "scale", piece.shape[0])
    scale = graph.emit("Gather", stored_scale, index, shape=shape[:-1], axis=0)
    column = graph.emit("Unsqueeze", scale, graph.ints(-1), shape=(*shape[:-1], 1))
    return graph.emit("Mul", values, column, shape=shape)


_INT4 = Reader("GatherBlockQuantized", _int4)

READERS: dict[str, Reader] = {
    "fp32": Reader("mapped", _mapped),
    "fp16": Reader("Cast", _half),
    "int8": Reader("DequantizeLinear", _int8),
    **dict.fromkeys(INT8_BLOCKS, Reader("DequantizeLinear", _int8_blocks)),
    "nf4": Reader("MatMulBnb4", _nf4, _multiply_nf4),
    **dict.fromkeys(INT4_BLOCKS, _INT4),
}
"""Reader by codec on stock onnxruntime, for least memory."""

_TABLE_ROWS: Mapping[str, tuple[str, Callable[[Graph, str, Piece, Shape], str]]] = {
    "fp16": ("Gather", _half_rows),
    "int8": ("Gather", _int8_rows),
    **dict.fromkeys(INT4_BLOCKS, ("GatherBlockQuantized", _int4_rows)),
}
