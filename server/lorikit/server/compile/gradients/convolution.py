# SPDX-License-Identifier: Apache-2.0
"""Gradient rules of convolutions, plain, grouped and depthwise, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from lorikit.server.compile.gradients.parts import Rule, integer, reshaped, unsupported
from lorikit.server.compile.graph import Graph, Node, Shape


def conv(graph: Graph, node: Node, dy: str, needs: Sequence[bool]) -> Sequence[str | None]:
    """Give dx by a transposed convolution; dw by one of x with dy, over the examples."""
    if node.attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise unsupported(node, f"with auto_pad {node.attributes['auto_pad']}")
    gradients: list[str | None] = [None] * len(node.inputs)
    if needs[0]:
        gradients[0] = _input_gradient(graph, node, dy)
    if needs[1]:
        gradients[1] = _weight_gradient(graph, node, dy)
    if len(needs) > 2 and needs[2]:
        axes = graph.ints(0, *range(2, len(graph.shape(dy))))
        shape = graph.shape(node.inputs[2])
        gradients[2] = graph.emit("ReduceSum", dy, axes, shape=shape, keepdims=0)
    return gradients


def _input_gradient(graph: Graph, node: Node, dy: str) -> str:
    x, weight = node.inputs[:2]
    window = _window(graph, node)
    sizes = zip(_static(graph, node, x), _static(graph, node, dy), strict=True)
    # What a strided window leaves over at the far end gets no gradient, but is part of x.
    rest = tuple(
        size - ((count - 1) * stride + (kernel - 1) * dilation + 1 - near - far)
        for (size, count), (stride, kernel, dilation, near, far) in zip(sizes, window, strict=True)
    )
    strides, kernels, dilations, near, far = zip(*window, strict=True)
    return graph.emit(
        "ConvTranspose",
        dy,
        weight,
        shape=graph.shape(x),
        strides=strides,
        kernel_shape=kernels,
        dilations=dilations,
        pads=(*near, *far),
        output_padding=rest,
        group=integer(node, "group", 1),
    )


def _weight_gradient(graph: Graph, node: Node, dy: str) -> str:
    """Examples take the part of channels: x [C/g, g B, ...] convolved with dy [M, B, ...]."""
    x, weight = node.inputs[:2]
    groups = integer(node, "group", 1)
    window = _window(graph, node)
    spatial = _static(graph, node, x)
    batch, channels = graph.shape(x)[:2]
    assert isinstance(channels, int)
    per_group = channels // groups
    axes = tuple(range(2, 2 + len(spatial)))
    image = x
    if groups > 1:
        split: Shape = (batch, groups, per_group, *spatial)
        later = tuple(axis + 1 for axis in axes)
        turned: Shape = (per_group, groups, batch, *spatial)
        image = graph.emit(
            "Transpose", reshaped(graph, x, split), shape=turned, perm=(2, 1, 0, *later)
        )
        image = reshaped(graph, image, (per_group, "examples", *spatial))
    else:
        turned = (channels, batch, *spatial)
        image = graph.emit("Transpose", x, shape=turned, perm=(1, 0, *axes))
    outputs = graph.shape(dy)[1]
    kernel_shape: Shape = (outputs, batch, *graph.shape(dy)[2:])
    kernel = graph.emit("Transpose", dy, shape=kernel_shape, perm=(1, 0, *axes))
    strides, kernels, dilations, near, far = zip(*window, strict=True)
    wide: Shape = (per_group, outputs, *("window" for _ in spatial))
    product = graph.emit(
        "Conv",
        image,
        kernel,
        shape=wide,
        strides=dilations,
        dilations=strides,
        pads=(*near, *far),
        group=groups,
    )
    cut: Shape = (per_group, outputs, *kernels)
    first, last = graph.ints(*(0 for _ in axes)), graph.ints(*kernels)
    product = graph.emit("Slice", product, first, last, graph.ints(*axes), shape=cut)
    shape = graph.shape(weight)
    return graph.emit("Transpose", product, shape=shape, perm=(1, 0, *axes))


def _window(graph: Graph, node: Node) -> list[tuple[int, int, int, int, int]]:
    """By spatial axis: stride, kernel length, dilation, padding before and after."""
    kernels = [int(n) for n in graph.shape(node.inputs[1])[2:]]
    count = len(kernels)
    strides = _numbers(node, "strides", (1,) * count)
    dilations = _numbers(node, "dilations", (1,) * count)
    pads = _numbers(node, "pads", (0,) * 2 * count)
    return list(zip(strides, kernels, dilations, pads[:count], pads[count:], strict=True))


def _numbers(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = node.attributes.get(name, default)
    assert isinstance(value, tuple)
    return tuple(int(n) for n in value)


def _static(graph: Graph, node: Node, name: str) -> tuple[int, ...]:
    """Spatial lengths of a value, which are fixed when the model is exported."""
    sizes = graph.shape(name)[2:]
    if not all(isinstance(n, int) for n in sizes):
        raise unsupported(node, f"on images of symbolic size {sizes}")
    return tuple(int(n) for n in sizes)


RULES: dict[str, Rule] = {"Conv": conv}
"""Rule by operator."""
