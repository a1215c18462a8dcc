# SPDX-License-Identifier: Apache-2.0
"""Normalisation, convolution, pooling and rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from lorikit.sdk._errors import UnsupportedPackageError
from lorikit.sdk.engines._torch.base import Attributes, Operator, real, text, whole, wholes


def layer_normalization(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The normalised values, the mean and the inverse deviation over the axes from ``axis``."""
    axes = tuple(range(whole(attributes, "axis", -1) % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(axes, keepdim=True)
    inverse = torch.rsqrt(variance + real(attributes, "epsilon", 1e-5))
    y = centred.mul_(inverse) * scale
    return (y if bias is None else y + bias), mean, inverse


def rms_normalization(attributes: Attributes, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Values divided by their root mean square, and one over that, over the axes from ``axis``."""
    axes = tuple(range(whole(attributes, "axis", -1) % x.dim(), x.dim()))
    inverse = torch.rsqrt(x.square().mean(axes, keepdim=True) + real(attributes, "epsilon", 1e-5))
    return x * inverse * scale, inverse


def skip_rms_normalization(
    attributes: Attributes, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """``rms_normalization`` of a sum, and as the fourth output the sum."""
    total = x + skip if bias is None else x + skip + bias
    y, inverse = rms_normalization({**attributes, "axis": -1}, total, scale)
    return y, None, inverse, total


def skip_layer_normalization(
    attributes: Attributes,
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``layer_normalization`` of a sum, and as the fourth output the sum."""
    total = x + skip if bias is None else x + skip + bias
    epsilon = real(attributes, "epsilon", 1e-12)
    y, mean, inverse = layer_normalization({"epsilon": epsilon}, total, scale, shift)
    return y, mean, inverse, total


def batch_normalization(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """Channels normalised by the stored statistics."""
    if whole(attributes, "training_mode", 0):
        raise UnsupportedPackageError("BatchNormalization that trains its statistics is unknown")
    epsilon = real(attributes, "epsilon", 1e-5)
    return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)


def instance_normalization(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """Each channel of each example normalised by itself."""
    epsilon = real(attributes, "epsilon", 1e-5)
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution over one to three axes."""
    rank = x.dim() - 2
    x, padding = _padded(attributes, x, tuple(weight.shape[2:]))
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return function(
        x,
        weight,
        bias,
        stride=wholes(attributes, "strides", (1,) * rank),
        padding=padding,
        dilation=wholes(attributes, "dilations", (1,) * rank),
        groups=whole(attributes, "group", 1),
    )


def conv_transpose(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The transpose of a convolution, which is also its gradient by the input."""
    rank = x.dim() - 2
    if "output_shape" in attributes or text(attributes, "auto_pad", "NOTSET") != "NOTSET":
        raise UnsupportedPackageError("ConvTranspose takes pads, not output_shape or auto_pad")
    strides = wholes(attributes, "strides", (1,) * rank)
    pads = wholes(attributes, "pads", (0,) * (2 * rank))
    function = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )[rank - 1]
    dilations = wholes(attributes, "dilations", (1,) * rank)
    y = function(x, weight, bias, strides, groups=whole(attributes, "group", 1), dilation=dilations)
    extra = wholes(attributes, "output_padding", (0,) * rank)
    if any(extra) and bias is not None:
        raise UnsupportedPackageError("ConvTranspose with output_padding takes no bias")
    ends = [(-pads[n], extra[n] - pads[rank + n]) for n in reversed(range(rank))]
    return functional.pad(y, [amount for both in ends for amount in both])


def _padded(
    attributes: Attributes, x: Tensor, kernel: tuple[int, ...], fill: float = 0.0
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the padding left for torch, which pads both ends alike."""
    rank = len(kernel)
    pads = _pads(attributes, x, kernel)
    if pads[:rank] == pads[rank:] and fill == 0.0:
        return x, pads[:rank]
    ends = [n for axis in reversed(range(rank)) for n in (pads[axis], pads[rank + axis])]
    return functional.pad(x, ends, value=fill), (0,) * rank


def _pads(attributes: Attributes, x: Tensor, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Elements to add at the starts and at the ends of the axes."""
    rank = len(kernel)
    mode = text(attributes, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        given = wholes(attributes, "pads", (0,) * (2 * rank))
        return given if mode == "NOTSET" else (0,) * (2 * rank)
    strides = wholes(attributes, "strides", (1,) * rank)
    dilations = wholes(attributes, "dilations", (1,) * rank)
    starts, ends = [], []
    for length, size, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-length // stride) - 1) * stride + (size - 1) * dilation + 1 - length, 0)
        small, large = total // 2, total - total // 2
        starts.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return (*starts, *ends)


def average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """Means of windows; padding counts only with ``count_include_pad``."""
    return _pool(attributes, x, _average)


def max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """Largest values of windows."""
    return _pool(attributes, x, _largest)


def _pool(
    attributes: Attributes, x: Tensor, function: Callable[[Attributes, Tensor], Tensor]
) -> Tensor:
    dilated = any(n != 1 for n in wholes(attributes, "dilations"))
    if whole(attributes, "ceil_mode", 0) or dilated:
        raise UnsupportedPackageError("pooling with ceil_mode or dilations is unknown here")
    return function(attributes, x)


def _average(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = wholes(attributes, "kernel_shape")
    rank = len(kernel)
    pooled = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
    strides = wholes(attributes, "strides", (1,) * rank)
    pads = _pads(attributes, x, kernel)
    ends = [n for axis in reversed(range(rank)) for n in (pads[axis], pads[rank + axis])]
    means = pooled(functional.pad(x, ends), kernel, strides)
    if not any(pads) or whole(attributes, "count_include_pad", 0):
        return means
    return means / pooled(functional.pad(torch.ones_like(x), ends), kernel, strides)


def _largest(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = wholes(attributes, "kernel_shape")
    rank = len(kernel)
    x, _ = _padded(attributes, x, kernel, fill=float("-inf"))
    pooled = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    largest: Tensor = pooled(x, kernel, wholes(attributes, "strides", (1,) * rank))
    return largest


def global_average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """Mean of each channel, its axes kept with length 1."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """Largest value of each channel, its axes kept with length 1."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def rotary_embedding(
    attributes: Attributes, x: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor
) -> Tensor:
    """Each head's pairs turned by the angle of their position.

    ``x`` is [batch, heads, length, size] or [batch, length, heads * size]; ``positions`` is
    [batch, length], or [1] for the first one of a run.
    """
    if whole(attributes, "is_packed_batching", 0):
        raise UnsupportedPackageError("RotaryEmbedding of packed batches is unknown here")
    turned = whole(attributes, "rotary_embedding_dim", 0)
    heads = whole(attributes, "num_heads", 0)
    if x.dim() == 3:
        size = x.shape[2] // heads if heads and turned else 2 * cosines.shape[1]
        values = x.reshape(*x.shape[:2], -1, size)
    else:
        values = x.transpose(1, 2)
    length = values.shape[1]
    if positions.numel() == 1 and positions.dim() == 1:
        positions = positions + torch.arange(length, device=positions.device)
    places = positions.reshape(-1, length).to(x.device)
    cosine, sine = (table[places].unsqueeze(2) for table in (cosines, sines))
    turned = turned or values.shape[-1]
    kept = values[..., turned:]
    result = torch.cat([_turned(attributes, values[..., :turned], cosine, sine), kept], dim=-1)
    return result.reshape(x.shape) if x.dim() == 3 else result.transpose(1, 2)


def _turned(attributes: Attributes, values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs of neighbours, or of the two halves, turned."""
    if whole(attributes, "interleaved", 0):
        first, second = values[..., ::2], values[..., 1::2]
    else:
        first, second = values.chunk(2, dim=-1)
    one = first * cosine - second * sine
    two = first * sine + second * cosine
    if whole(attributes, "interleaved", 0):
        return torch.stack([one, two], dim=-1).flatten(-2)
    return torch.cat([one, two], dim=-1)


OPERATORS: Mapping[str, Operator] = {
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "MaxPool": max_pool,
    "SimplifiedLayerNormalization": rms_normalization,
}
"""Operators of ONNX's own domain; the last is onnxruntime's, which registers it there."""

CONTRIB: Mapping[str, Operator] = {
    "RotaryEmbedding": rotary_embedding,
    "SkipLayerNormalization": skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": skip_rms_normalization,
}
"""Operators of onnxruntime's domain ``com.microsoft``."""
