# SPDX-License-Identifier: Apache-2.0
"""Operators that compute each element by itself, and those that reduce axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from lorikit.sdk.engines._torch.base import (
    TYPES,
    Attributes,
    Operator,
    numbers,
    real,
    text,
    whole,
    wholes,
)


def _plain(function: Callable[..., Tensor]) -> Operator:
    """An operator without attributes that torch has as it is."""

    def run(attributes: Attributes, *inputs: Tensor) -> Tensor:
        return function(*inputs)

    return run


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of any number of inputs."""

    def run(attributes: Attributes, *inputs: Tensor) -> Tensor:
        return reduce(function, inputs)

    return run


def cast(attributes: Attributes, x: Tensor) -> Tensor:
    """Change the element type; floats lose their fraction when they become whole."""
    return x.to(TYPES[whole(attributes, "to", 1)])


def cast_like(attributes: Attributes, x: Tensor, like: Tensor) -> Tensor:
    """Change the element type to another tensor's."""
    return x.to(like.dtype)


def divide(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """Quotient; of whole numbers, cut towards zero."""
    if a.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def modulo(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """Remainder with the sign of the divisor, or with ``fmod`` of the dividend."""
    return torch.fmod(a, b) if whole(attributes, "fmod", 0) else torch.remainder(a, b)


def power(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """``a`` to the ``b``, in the type of ``a``."""
    return torch.pow(a, b).to(a.dtype)


def bit_shift(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """Shift of unsigned numbers; torch shifts signed ones only, so the bits change their name."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    if text(attributes, "direction", "") == "LEFT":
        kind = signed.get(a.dtype, a.dtype)
        return (a.view(kind) << b.view(kind)).view(a.dtype)
    if a.dtype not in signed:
        return a >> b
    kind = signed[a.dtype]
    bits, count = a.view(kind), b.view(kind)
    width = 8 * a.element_size()
    kept = torch.where(count == 0, -1, ~(-1 << (width - count).clamp(max=width - 1)))
    return ((bits >> count) & kept.to(kind)).view(a.dtype)


def clip(
    attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Limit every element; a bound that is left out does not hold."""
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def gelu(attributes: Attributes, x: Tensor) -> Tensor:
    """Gaussian error linear unit, exact or by tanh."""
    return functional.gelu(x, approximate=text(attributes, "approximate", "none"))


def fast_gelu(attributes: Attributes, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gelu by tanh, after an optional bias."""
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def quick_gelu(attributes: Attributes, x: Tensor) -> Tensor:
    """``x`` times the sigmoid of ``alpha x``."""
    return x * torch.sigmoid(real(attributes, "alpha", 1.702) * x)


def hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    """A line, cut at 0 and 1."""
    line = x * real(attributes, "alpha", 0.2) + real(attributes, "beta", 0.5)
    return line.clamp(0, 1)


def leaky_relu(attributes: Attributes, x: Tensor) -> Tensor:
    """Relu with a slope below zero."""
    return functional.leaky_relu(x, real(attributes, "alpha", 0.01))


def elu(attributes: Attributes, x: Tensor) -> Tensor:
    """Exponential linear unit."""
    return functional.elu(x, real(attributes, "alpha", 1.0))


def softmax(attributes: Attributes, x: Tensor) -> Tensor:
    """Exponentials along one axis that sum to 1."""
    return torch.softmax(x, whole(attributes, "axis", -1))


def log_softmax(attributes: Attributes, x: Tensor) -> Tensor:
    """Logarithms of ``softmax``."""
    return torch.log_softmax(x, whole(attributes, "axis", -1))


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """A reduction over axes that an attribute or the second input names; all without either."""

    def run(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = wholes(attributes, "axes") if axes is None else tuple(numbers(axes))
        if not chosen:
            if whole(attributes, "noop_with_empty_axes", 0):
                return x
            chosen = tuple(range(x.dim()))
        return function(x, chosen, bool(whole(attributes, "keepdims", 1)))

    return run


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.mean(axes, keepdim=keep)


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _arg(function: Callable[[Tensor, int, bool], Tensor]) -> Operator:
    """Position of an extreme along one axis, the first of equal ones."""

    def run(attributes: Attributes, x: Tensor) -> Tensor:
        axis, keep = whole(attributes, "axis", 0), bool(whole(attributes, "keepdims", 1))
        if not whole(attributes, "select_last_index", 0):
            return function(x, axis, keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)

    return run


def cumulative_sum(attributes: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    """Running sum along an axis, with or without the element itself, from either end."""
    (along,) = numbers(axis)
    backwards = whole(attributes, "reverse", 0)
    source = x.flip(along) if backwards else x
    total = source.cumsum(along, dtype=x.dtype)
    if whole(attributes, "exclusive", 0):
        total = total - source
    return total.flip(along) if backwards else total


OPERATORS: Mapping[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "BitShift": bit_shift,
    "BitwiseAnd": _plain(torch.bitwise_and),
    "BitwiseNot": _plain(torch.bitwise_not),
    "BitwiseOr": _plain(torch.bitwise_or),
    "BitwiseXor": _plain(torch.bitwise_xor),
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": _plain(torch.ceil),
    "Clip": clip,
    "Cos": _plain(torch.cos),
    "CumSum": cumulative_sum,
    "Div": divide,
    "Elu": elu,
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
    "Gelu": gelu,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _plain(functional.hardswish),
    "Identity": _plain(lambda x: x),
    "IsNaN": _plain(torch.isnan),
    "LeakyRelu": leaky_relu,
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": log_softmax,
    "Max": _fold(torch.maximum),
    "Min": _fold(torch.minimum),
    "Mod": modulo,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "Pow": power,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: _sum(x.square(), axes, keep).sqrt()),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x.square(), axes, keep)),
    "Relu": _plain(torch.relu),
    "Round": _plain(torch.round),
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Softmax": softmax,
    "Softplus": _plain(functional.softplus),
    "Sqrt": _plain(torch.sqrt),
    "Sub": _plain(torch.sub),
    "Sum": _fold(torch.add),
    "Tanh": _plain(torch.tanh),
    "Where": _plain(torch.where),
    "Xor": _plain(torch.logical_xor),
}
"""Operators of ONNX's own domain."""

CONTRIB: Mapping[str, Operator] = {
    "BiasGelu": _plain(lambda x, bias: functional.gelu(x + bias)),
    "FastGelu": fast_gelu,
    "Gelu": _plain(functional.gelu),
    "QuickGelu": quick_gelu,
}
"""Operators of onnxruntime's domain ``com.microsoft``."""
