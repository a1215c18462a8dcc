# SPDX-License-Identifier: Apache-2.0
"""Operators that move elements: views, joins, and reads and writes by index."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lorikit.sdk._errors import UnsupportedPackageError
from lorikit.sdk.engines._torch.base import (
    Attributes,
    Operator,
    numbers,
    text,
    whole,
    wholes,
)


def shape_of(attributes: Attributes, x: Tensor) -> Tensor:
    """Lengths of the axes from ``start`` to ``end``, int64."""
    end = attributes.get("end")
    stop = None if end is None else whole(attributes, "end", 0)
    return torch.tensor(list(x.shape)[whole(attributes, "start", 0) : stop], dtype=torch.int64)


def size_of(attributes: Attributes, x: Tensor) -> Tensor:
    """Number of elements, int64."""
    return torch.tensor(x.numel(), dtype=torch.int64)


def reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """The elements in another shape; 0 keeps an axis, -1 stands for what is left."""
    target = numbers(shape)
    if not whole(attributes, "allowzero", 0):
        target = [n if n != 0 else x.shape[i] for i, n in enumerate(target)]
    return x.reshape(target)


def flatten(attributes: Attributes, x: Tensor) -> Tensor:
    """A matrix: the axes before ``axis``, and the others."""
    axis = whole(attributes, "axis", 1)
    return x.reshape(x.shape[:axis].numel(), -1 if x.numel() else x.shape[axis:].numel())


def squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without the named axes of length 1, or without all such."""
    chosen = wholes(attributes, "axes") if axes is None else tuple(numbers(axes))
    return x.squeeze(chosen) if chosen else x.squeeze()


def unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """With axes of length 1 at the named places of the result."""
    chosen = wholes(attributes, "axes") if axes is None else tuple(numbers(axes))
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def transpose(attributes: Attributes, x: Tensor) -> Tensor:
    """The axes in another order; reversed without one."""
    return x.permute(wholes(attributes, "perm", tuple(reversed(range(x.dim())))))


def concat(attributes: Attributes, *parts: Tensor) -> Tensor:
    """The parts one after another along an axis."""
    return torch.cat(parts, whole(attributes, "axis", 0))


def split(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Parts along an axis, of given or of equal sizes (the last may be smaller)."""
    axis = whole(attributes, "axis", 0)
    if sizes is not None:
        return torch.split(x, numbers(sizes), axis)
    count = whole(attributes, "num_outputs", 1)
    return torch.split(x, -(-x.shape[axis] // count), axis)


def slice_(
    attributes: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Ranges of some axes, as Python's slices are; steps may be negative."""
    first, last = numbers(starts), numbers(ends)
    along = list(range(len(first))) if axes is None else numbers(axes)
    stride = [1] * len(first) if steps is None else numbers(steps)
    for start, end, axis, step in zip(first, last, along, stride, strict=True):
        length = x.shape[axis]
        places = range(*slice(start, end, step).indices(length))
        if step > 0:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(start, end, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """Repeated along axes of length 1, as broadcasting does; either side may have them."""
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(numbers(shape))))


def tile(attributes: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    """Repeated whole, a number of times along each axis."""
    return x.tile(numbers(repeats))


def range_(attributes: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Numbers from ``start`` to below ``limit`` in steps of ``delta``."""
    bounds = [value.item() for value in (start, limit, delta)]
    return torch.arange(*bounds, dtype=start.dtype)


def constant(attributes: Attributes) -> Tensor:
    """A value that stands in the graph."""
    value = attributes.get("value")
    if isinstance(value, Tensor):
        return value
    for name, kind in (("value_int", torch.int64), ("value_float", torch.float32)):
        for key in (name, f"{name}s"):
            if key in attributes:
                return torch.tensor(attributes[key], dtype=kind)
    raise UnsupportedPackageError(f"a Constant of {sorted(attributes)} is unknown here")


def constant_of_shape(attributes: Attributes, shape: Tensor) -> Tensor:
    """One value everywhere; float32 zero by default."""
    value = attributes.get("value")
    if not isinstance(value, Tensor):
        return torch.zeros(numbers(shape))
    return torch.full(numbers(shape), value.item(), dtype=value.dtype)


def one_hot(attributes: Attributes, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """The second of two values where the position along a new axis is the index, else the first.

    Negative indices count from the end; one outside the depth has the first value everywhere.
    """
    (count,) = numbers(depth)
    axis = whole(attributes, "axis", -1)
    index = indices.to(torch.int64)
    index = torch.where(index < 0, index + count, index)
    spread = index.unsqueeze(axis % (index.dim() + 1))
    places = torch.arange(count, device=index.device)
    places = places.reshape([count if n == axis % spread.dim() else 1 for n in range(spread.dim())])
    off, on = values.to(index.device).unbind()
    return torch.where(spread == places, on, off)


def trilu(attributes: Attributes, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    """The upper or lower triangle of the last two axes, zeros elsewhere."""
    offset = 0 if diagonal is None else numbers(diagonal)[0]
    return torch.triu(x, offset) if whole(attributes, "upper", 1) else torch.tril(x, offset)


def eye_like(attributes: Attributes, x: Tensor) -> Tensor:
    """Ones on a diagonal, zeros elsewhere, in the shape of ``x``."""
    if "dtype" in attributes or "k" in attributes:
        raise UnsupportedPackageError("EyeLike with dtype or k is unknown here")
    return torch.eye(*x.shape, dtype=x.dtype, device=x.device)


def pad(
    attributes: Attributes,
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """More elements at the ends of axes; fewer where a number is negative."""
    mode = text(attributes, "mode", "constant")
    if mode != "constant":
        raise UnsupportedPackageError(f"Pad in mode {mode!r} is unknown here")
    amounts = numbers(pads)
    along = list(range(x.dim())) if axes is None else [a % x.dim() for a in numbers(axes)]
    before = dict(zip(along, amounts[: len(along)], strict=True))
    after = dict(zip(along, amounts[len(along) :], strict=True))
    reversed_axes = reversed(range(x.dim()))
    flat = [n for axis in reversed_axes for n in (before.get(axis, 0), after.get(axis, 0))]
    fill = 0.0 if value is None else value.item()
    return functional.pad(x, flat, value=fill)


def _counted_from_start(indices: Tensor, length: int) -> Tensor:
    """Indices with negative ones counted from the end.

    Raises:
        IndexError: One is outside; a device would otherwise lose its context for good.
    """
    index = indices.to(torch.int64)
    if index.is_cuda and index.numel() and not bool((index.abs() <= length).all()):
        raise IndexError(f"an index is outside the {length} rows it reads")
    return torch.where(index < 0, index + length, index)


def gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Slices along one axis by index; the shape of the indices replaces the axis."""
    axis = whole(attributes, "axis", 0) % x.dim()
    index = _counted_from_start(indices, x.shape[axis])
    rows = x.index_select(axis, index.reshape(-1))
    return rows.reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


def gather_elements(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Single elements by their index along one axis."""
    axis = whole(attributes, "axis", 0)
    return torch.gather(x, axis, _counted_from_start(indices, x.shape[axis]))


def gather_nd(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Slices by an index of several axes, the last axis of ``indices``."""
    if whole(attributes, "batch_dims", 0):
        raise UnsupportedPackageError("GatherND with batch_dims is unknown here")
    columns = indices.unbind(-1)
    places = [_counted_from_start(c, x.shape[axis]) for axis, c in enumerate(columns)]
    return x[tuple(places)]


def scatter_elements(attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A copy with single elements written, or added to, by their index along one axis."""
    axis = whole(attributes, "axis", 0) % x.dim()
    index = _counted_from_start(indices, x.shape[axis])
    if text(attributes, "reduction", "none") == "none":
        return x.scatter(axis, index, updates)
    grid = torch.meshgrid(*(torch.arange(n, device=x.device) for n in index.shape), indexing="ij")
    places = tuple(index if n == axis else grid[n] for n in range(x.dim()))
    return _written(attributes, x, places, updates)


def scatter_nd(attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A copy with slices written, or added to, by an index of several axes."""
    columns = indices.unbind(-1)
    places = tuple(_counted_from_start(c, x.shape[axis]) for axis, c in enumerate(columns))
    return _written(attributes, x, places, updates)


def _written(
    attributes: Attributes, x: Tensor, places: tuple[Tensor, ...], updates: Tensor
) -> Tensor:
    """Write by index; sums are added in a fixed order, so that equal runs give equal bits."""
    reduction = text(attributes, "reduction", "none")
    if reduction not in ("none", "add"):
        raise UnsupportedPackageError(f"scatter with reduction {reduction!r} is unknown here")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return x.index_put(places, updates, accumulate=reduction == "add")
    finally:
        torch.use_deterministic_algorithms(before)


def top_k(attributes: Attributes, x: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    """The largest, or smallest, elements along an axis in order, and their positions."""
    axis, largest = whole(attributes, "axis", -1), bool(whole(attributes, "largest", 1))
    places = torch.sort(x, dim=axis, descending=largest, stable=True)
    (wanted,) = numbers(count)
    return places.values.narrow(axis, 0, wanted), places.indices.narrow(axis, 0, wanted)


OPERATORS: Mapping[str, Operator] = {
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "Shape": shape_of,
    "Size": size_of,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "TopK": top_k,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
"""Operators of ONNX's own domain."""
