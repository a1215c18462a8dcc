# SPDX-License-Identifier: Apache-2.0
"""Matrix products, and weights that are read from fewer bits.

A packed weight stays packed in memory: it is de-quantised into a value that lives for one product.

Source:
    Layouts of onnxruntime's operators:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lorikit.quantization.fp4 import LEVELS as FP4_LEVELS
from lorikit.quantization.nf4 import LEVELS as NF4_LEVELS
from lorikit.sdk._errors import UnsupportedPackageError
from lorikit.sdk.engines._torch.base import (
    Attributes,
    Nibbles,
    Operator,
    Value,
    real,
    text,
    whole,
)
from lorikit.sdk.engines._torch.shapes import gather


def matmul(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """Product of the last two axes, broadcast over the others."""
    return torch.matmul(a, b)


def fused_matmul(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """``alpha`` times the product of matrices that may each be read transposed."""
    if whole(attributes, "transBatchA", 0) or whole(attributes, "transBatchB", 0):
        raise UnsupportedPackageError("FusedMatMul with transposed batches is unknown here")
    if whole(attributes, "transA", 0):
        a = a.mT
    if whole(attributes, "transB", 0):
        b = b.mT
    return _scaled(torch.matmul(a, b), real(attributes, "alpha", 1.0))


def gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """``alpha A B + beta C``; A and B may be read transposed, C is broadcast."""
    a = a.mT if whole(attributes, "transA", 0) else a
    b = b.mT if whole(attributes, "transB", 0) else b
    alpha, beta = real(attributes, "alpha", 1.0), real(attributes, "beta", 1.0)
    if c is None:
        return _scaled(a @ b, alpha)
    return torch.addmm(c, a, b, alpha=alpha, beta=beta)


def einsum(attributes: Attributes, *inputs: Tensor) -> Tensor:
    """Sum of products by an equation of axis letters."""
    return torch.einsum(text(attributes, "equation", ""), *inputs)


def matmul_bnb4(
    attributes: Attributes, x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x W^T`` with W in 4 bits as bitsandbytes packs them (quant_type 1: NF4, 0: FP4).

    The compiler also reads whole weights with it, as a column times a single number; that costs
    one multiplication in place, and no second copy.
    """
    rows, columns = whole(attributes, "N", 0), whole(attributes, "K", 0)
    weight = _dequantized_4bit(
        codes,
        absmax,
        (rows, columns),
        block=whole(attributes, "block_size", 64),
        kind="nf4" if whole(attributes, "quant_type", 1) else "fp4",
    )
    if columns == 1 and x.numel() == 1 and bias is None:
        return weight.view(*x.shape[:-1], rows).mul_(x.reshape(()))
    product = x @ (weight.T if whole(attributes, "transB", 1) else weight)
    return product if bias is None else product + bias


def _dequantized_4bit(
    codes: Tensor, absmax: Tensor, shape: tuple[int, ...], *, block: int, kind: str
) -> Tensor:
    """Values of a weight packed by bitsandbytes.

    Args:
        codes: uint8, two values each, the first in the high nibble.
        absmax: Largest magnitude of each block, float32.
        shape: Of the weight.
        block: Values that share a magnitude.
        kind: ``nf4`` or ``fp4``.

    Returns:
        float32 in ``shape``, by bitsandbytes' kernel on CUDA and by a table elsewhere.
    """
    kernels = _kernels() if codes.is_cuda else None
    if kernels is not None:
        values: Tensor = kernels.dequantized(codes, absmax, shape, block=block, kind=kind)
        return values
    levels = _level_pairs(kind, codes.device)
    values = _looked_up(levels, codes.reshape(-1))
    count = torch.Size(shape).numel()
    if count % block:
        spread = absmax.repeat_interleave(block)[:count]
        return (values[:count] * spread).reshape(shape)
    return values.view(-1, block).mul_(absmax.reshape(-1, 1)).reshape(shape)


def _looked_up(pairs: Tensor, codes: Tensor) -> Tensor:
    """The two float32 values that each byte stands for, along the last axis.

    A pair is read as one number of 64 bits, which is several times faster than two of 32.
    """
    found = pairs.index_select(0, codes.reshape(-1).to(torch.int32))
    return found.view(torch.float32).reshape(*codes.shape[:-1], -1)


@cache
def _kernels() -> ModuleType | None:
    """Kernels of bitsandbytes, or None where it is not installed: the table then serves CUDA."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    return importlib.import_module("lorikit.sdk.engines._bitsandbytes")


@cache
def _level_pairs(kind: str, device: torch.device) -> Tensor:
    """The levels of a byte's high and low half, int64 [256] that hold two float32 each."""
    levels = torch.tensor(NF4_LEVELS if kind == "nf4" else FP4_LEVELS)
    byte = torch.arange(256)
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
    return pairs.view(torch.int64).reshape(-1).to(device)


@cache
def _nibble_pairs(device: torch.device) -> Tensor:
    """A byte's low and high half less 8, int64 [256] that hold two float32 each."""
    byte = torch.arange(256)
    pairs = torch.stack([byte & 15, byte >> 4], dim=1).to(torch.float32) - 8
    return pairs.view(torch.int64).reshape(-1).to(device)


def _centred(codes: Tensor, bits: int, kind: torch.dtype) -> Tensor:
    """Packed codes less the middle of their range, one a value along the last axis."""
    if bits == 4:
        return _looked_up(_nibble_pairs(codes.device), codes).to(kind)
    return _unpacked(codes, bits).to(kind).sub_(1 << (bits - 1))


def matmul_nbits(
    attributes: Attributes,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    group: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x W^T`` with W in blocks of 2, 4 or 8 bits along K, the low bits first."""
    if group is not None and group.numel():
        raise UnsupportedPackageError("MatMulNBits with a group index is unknown here")
    rows, columns = whole(attributes, "N", 0), whole(attributes, "K", 0)
    bits, block = whole(attributes, "bits", 4), whole(attributes, "block_size", 32)
    values = _centred(codes.reshape(rows, -1), bits, scales.dtype)
    blocks = values.shape[1] // block
    values = values.view(rows, blocks, block)
    if zero_points is not None:
        zero = _zero_points(zero_points, rows, blocks, bits).to(scales.dtype)
        values.sub_(zero - (1 << (bits - 1)))
    values.mul_(scales.reshape(rows, blocks, 1))
    product = x @ values.view(rows, -1)[:, :columns].to(x.dtype).T
    return product if bias is None else product + bias


def _zero_points(packed: Tensor, rows: int, blocks: int, bits: int) -> Tensor:
    """Zero point of each block, [rows, blocks, 1], stored as numbers or packed like codes."""
    if packed.is_floating_point():
        return packed.reshape(rows, blocks, 1)
    return _unpacked(packed.reshape(rows, -1), bits)[:, :blocks].reshape(rows, blocks, 1)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    """Codes of fewer than 8 bits, one a byte, along the last axis; the low bits come first."""
    if bits == 8:
        return codes
    mask = (1 << bits) - 1
    parts = [(codes >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def gather_block_quantized(
    attributes: Attributes,
    data: Value,
    indices: Tensor,
    scales: Tensor,
    zero_points: Value | None = None,
) -> Tensor:
    """Rows of a table in blocks of 4 or 8 bits; only the rows that are asked for are unpacked."""
    rank = len(data.shape)
    gathered = whole(attributes, "gather_axis", 0) % rank
    quantized = whole(attributes, "quantize_axis", 1) % rank
    block = whole(attributes, "block_size", 128)
    if gathered != 0 or quantized != rank - 1:
        raise UnsupportedPackageError("GatherBlockQuantized reads rows of blocks along the end")
    scale = gather({}, scales, indices)
    values = _rows(attributes, data, indices, scale.dtype)
    if zero_points is not None:
        points = _rows(attributes, zero_points, indices, scale.dtype)
        _in_blocks(values, points[..., : scale.shape[-1]], block, Tensor.sub_)
    _in_blocks(values, scale, block, Tensor.mul_)
    return values


def _rows(attributes: Attributes, data: Value, indices: Tensor, kind: torch.dtype) -> Tensor:
    """Rows by index, one number a code; unsigned bytes are counted from the middle of their range.

    That is the zero point where none is given; where one is, it is counted from there as well.
    """
    if isinstance(data, Nibbles):
        return gather({}, data.unpacked(), indices).to(kind)
    rows = gather({}, data, indices)
    if data.dtype != torch.uint8:
        return rows.to(kind)
    return _centred(rows, whole(attributes, "bits", 4), kind)


def _in_blocks(
    values: Tensor, per_block: Tensor, block: int, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Change values in place by the number of their block along the last axis."""
    if values.shape[-1] == block * per_block.shape[-1]:
        change(values.view(*per_block.shape, block), per_block.unsqueeze(-1))
    else:  # the last block is not full
        change(values, per_block.repeat_interleave(block, dim=-1)[..., : values.shape[-1]])


def dequantize_linear(
    attributes: Attributes, x: Value, scale: Tensor, zero_point: Value | None = None
) -> Tensor:
    """``(x - zero_point) scale``, with a scale for all, for each slice, or for each block."""
    codes = x.unpacked() if isinstance(x, Nibbles) else x
    block = whole(attributes, "block_size", 0)
    axis = whole(attributes, "axis", 1)
    values = codes.to(torch.int32 if codes.dtype == torch.int32 else scale.dtype)
    if zero_point is not None:
        zero = zero_point.unpacked() if isinstance(zero_point, Nibbles) else zero_point
        values = values - _along(zero, codes, axis, block).to(values.dtype)
    return values.to(scale.dtype).mul_(_along(scale, codes, axis, block))


def _along(parameter: Tensor, codes: Tensor, axis: int, block: int) -> Tensor:
    """A parameter of all, of slices along an axis or of blocks along it, ready to broadcast."""
    if block:
        along = axis % codes.dim()
        return parameter.repeat_interleave(block, dim=along).narrow(along, 0, codes.shape[along])
    if parameter.numel() == 1:
        return parameter.reshape(())
    along = axis % codes.dim()
    return parameter.reshape([-1 if n == along else 1 for n in range(codes.dim())])


def quantize_linear(
    attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """Nearest codes of 8 bits, ties to even."""
    if whole(attributes, "block_size", 0):
        raise UnsupportedPackageError("QuantizeLinear in blocks is unknown here")
    axis = whole(attributes, "axis", 1)
    kind = torch.uint8 if zero_point is None else zero_point.dtype
    values = torch.round(x / _along(scale, x, axis, 0))
    if zero_point is not None:
        values = values + _along(zero_point, x, axis, 0)
    limits = torch.iinfo(kind)
    return values.clamp(limits.min, limits.max).to(kind)


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1.0 else values * factor


OPERATORS: Mapping[str, Operator] = {
    "DequantizeLinear": dequantize_linear,
    "Einsum": einsum,
    "Gemm": gemm,
    "MatMul": matmul,
    "QuantizeLinear": quantize_linear,
}
"""Operators of ONNX's own domain."""

CONTRIB: Mapping[str, Operator] = {
    "DequantizeLinear": dequantize_linear,
    "FusedMatMul": fused_matmul,
    "GatherBlockQuantized": gather_block_quantized,
    "MatMulBnb4": matmul_bnb4,
    "MatMulNBits": matmul_nbits,
    "QuantizeLinear": quantize_linear,
}
"""Operators of onnxruntime's domain ``com.microsoft``."""
