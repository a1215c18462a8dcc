# SPDX-License-Identifier: Apache-2.0
"""Changes of the base model as thin factors beside it, shared by methods that change the base.

A module computes ``y = Q(W0) x + D_B D_A x + s B A x``. The frozen weight W0 stays as it is stored,
quantised or not; what the rounds fold into it is ``D_B D_A``, in float32 and without a scale. A
package offers this with two untrained adapter tensors a module,

    <module>.base_delta_A   role delta_A   [rank, d_in]
    <module>.base_delta_B   role delta_B   [d_out, rank]

which belong to the module ``<module>.base_delta``, so that their rank is their own. They travel
with the adapter to every device, also to one that was away, and are never sent back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.fold import fold
from lorikit.server.aggregate.product import Float64, thin_svd
from lorikit.server.aggregate.split import split
from lorikit.server.methods.base import AdapterSpace

DELTA_ROLES = ("delta_A", "delta_B")

DELTA_SUFFIX = ".base_delta"
"""What follows a LoRA module's name in that of its change."""

DELTA_RANK = "delta_rank"
"""Symbol of a change's rank in graphs, which memory predictions put a number to."""

Term = tuple[float, Float32 | Float64, Float32 | Float64]
"""Factor, left [d_out, any] and right [any, d_in] of one change."""


def check_deltas(delta_rank: int, scale: float) -> None:
    """Nothing for options that a method which folds into the base can work with.

    Raises:
        ValueError: A negative limit on the rank, or a LoRA scale of 0, at which nothing is learned.
    """
    if delta_rank < 0:
        raise ValueError(f"delta_rank must be at least 0 (0 for no limit), got {delta_rank}")
    if scale == 0:
        raise ValueError("scale must not be 0")


def delta_tensors(a: AdapterTensor, b: AdapterTensor) -> tuple[AdapterTensor, AdapterTensor]:
    """The tensors that hold the change of a LoRA pair's module."""
    module = f"{a.module}{DELTA_SUFFIX}"
    return (
        replace(a, name=f"{module}_A", role="delta_A", module=module, trained=False),
        replace(b, name=f"{module}_B", role="delta_B", module=module, trained=False),
    )


def with_deltas(space: AdapterSpace) -> AdapterSpace:
    """The space of a package that offers base deltas for every LoRA pair."""
    if space.named(*DELTA_ROLES):
        return space
    deltas = (tensor for a, b in space.pairs() for tensor in delta_tensors(a, b))
    return replace(space, tensors=(*space.tensors, *deltas))


def largest_delta_ranks(deltas: Sequence[AdapterTensor], limit: int) -> dict[str, int]:
    """Largest rank of each delta by its module, at most that of the weight it changes.

    Args:
        deltas: Tensors of the roles ``delta_A`` and ``delta_B``.
        limit: Largest rank of any; 0 for no limit.
    """
    ranks: dict[str, int] = {}
    for tensor in deltas:
        width = next(int(length) for length in tensor.shape if length != "rank")
        ranks[tensor.module] = min(ranks.get(tensor.module, limit or width), width)
    return ranks


def no_deltas(space: AdapterSpace, adapter: Tensors) -> Tensors:
    """Zeros of rank 1 for every delta: the base as it is."""
    zeros: Tensors = {}
    for a, b in space.pairs():
        delta_a, delta_b = delta_tensors(a, b)
        zeros[delta_a.name] = np.zeros((1, adapter[a.name].shape[1]), np.float32)
        zeros[delta_b.name] = np.zeros((adapter[b.name].shape[0], 1), np.float32)
    return zeros


def folded_deltas(
    space: AdapterSpace, adapter: Tensors, changes: Mapping[str, Iterable[Term]], limit: int
) -> tuple[Tensors, float]:
    """The deltas after changes of some modules.

    Args:
        space: The model's adapter tensors.
        adapter: Every tensor of the space, deltas included.
        changes: What to add, by LoRA module.
        limit: Largest rank of a delta; 0 for none.

    Returns:
        The deltas of those modules, and the largest share of a delta's norm that was cut.
    """
    deltas: Tensors = {}
    lost = 0.0
    for a, b in space.pairs():
        if a.module not in changes:
            continue
        delta_a, delta_b = delta_tensors(a, b)
        before = (1.0, adapter[delta_b.name], adapter[delta_a.name])
        folded = fold([before, *changes[a.module]], limit=limit)
        deltas[delta_a.name], deltas[delta_b.name] = folded.a, folded.b
        lost = max(lost, folded.lost)
    return deltas, lost


def merged_adapter(
    space: AdapterSpace, adapter: Tensors, rank: int | None, *, scale: float
) -> Tensors:
    """The adapter as plain LoRA, deltas merged into the pairs: what a PEFT folder can hold.

    Args:
        space: The model's adapter tensors.
        adapter: Every tensor of the space, deltas included.
        rank: Largest rank; the run's largest, or more, stands for the exact sum at whatever rank
            it has. None leaves the deltas beside LoRA, as a package reads them.
        scale: LoRA scale s.

    Returns:
        LoRA pairs with ``s B A`` equal to the sum, or its best approximation of that rank, and
        everything else but the deltas.
    """
    if rank is None:
        return dict(adapter)
    out = {t.name: adapter[t.name] for t in space.tensors if t.role not in DELTA_ROLES}
    for a, b in space.pairs():
        delta_a, delta_b = delta_tensors(a, b)
        left = np.concatenate([scale * adapter[b.name], adapter[delta_b.name]], axis=1)
        right = np.concatenate([adapter[a.name], adapter[delta_a.name]])
        thin = thin_svd(left.astype(np.float64), right.astype(np.float64))
        wanted = len(thin.values) if rank >= space.max_rank else rank
        out[a.name], out[b.name] = split(thin, wanted, scale=scale, mode="sqrt")
    return out
