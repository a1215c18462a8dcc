# SPDX-License-Identifier: Apache-2.0
"""What methods share about adapter tensors: cutting to an assignment, and the mean over holders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.tensors import Float32, Tensors
from lorikit.server.aggregate.mean import HolderMean
from lorikit.server.aggregate.product import thin_svd
from lorikit.server.aggregate.ranks import truncate
from lorikit.server.aggregate.split import split
from lorikit.server.methods.base import AdapterSpace, Assignment, Contribution, State

Weighting = Literal["data", "uniform"]
"""``data``: a device counts by its number of examples n_k; ``uniform``: all count the same."""

WEIGHTINGS: tuple[Weighting, ...] = ("data", "uniform")


def device_weight(contribution: Contribution, weighting: Weighting) -> float:
    """Weight of one device in a mean, before it is divided by the sum."""
    return float(contribution.examples) if weighting == "data" else 1.0


def every_layer(space: AdapterSpace) -> tuple[int, ...]:
    """All layers, from the input to the output."""
    return tuple(range(space.layer_count))


def same_ranks(
    space: AdapterSpace, rank: int, layers: Sequence[int] | None = None
) -> dict[str, int]:
    """The same rank for every module of those layers (None for all) and of no layer."""
    wanted = every_layer(space) if layers is None else layers
    return {a.module: rank for a, _ in space.pairs() if is_in(a, wanted)}


def is_in(tensor: AdapterTensor, layers: Sequence[int]) -> bool:
    """Whether the tensor belongs to one of the layers, or to none at all as the head does."""
    return tensor.layer < 0 or tensor.layer in layers


def trained_tensors(space: AdapterSpace, assignment: Assignment) -> tuple[AdapterTensor, ...]:
    """The tensors that move under an assignment, in the order of the space."""
    return tuple(
        tensor
        for tensor in space.tensors
        if tensor.role in assignment.train_roles
        and is_in(tensor, assignment.trained_layers)
        and (tensor.role != "head" or assignment.train_head)
    )


def adapter_of(state: State, space: AdapterSpace) -> Tensors:
    """The global adapter in a state, without what a method keeps beside it."""
    return {tensor.name: state.tensors[tensor.name] for tensor in space.tensors}


def leading_ranks(
    adapter: Tensors,
    space: AdapterSpace,
    ranks: Mapping[str, int],
    layers: Sequence[int] | None = None,
) -> Tensors:
    """Tensors of those layers and the head, LoRA pairs cut to their first ranks.

    Args:
        adapter: Every tensor of the space.
        space: The model's adapter tensors.
        ranks: Rank by module; a pair that has fewer ranks keeps them.
        layers: Layers to keep; None for all.
    """
    wanted = every_layer(space) if layers is None else layers
    kept = {t.name: adapter[t.name] for t in space.tensors if is_in(t, wanted)}
    for a, b in space.pairs():
        if a.name in kept:
            kept[a.name], kept[b.name] = truncate(kept[a.name], kept[b.name], ranks[a.module])
    return kept


def best_of_rank(adapter: Tensors, space: AdapterSpace, rank: int | None) -> Tensors:
    """The adapter with every pair of a larger rank replaced by the best one of rank ``rank``.

    By thin SVD, since the ranks of a plainly averaged pair have no order. The scale s cancels.
    """
    if rank is None:
        return dict(adapter)
    out = dict(adapter)
    for a, b in space.pairs():
        if adapter[a.name].shape[0] > rank:
            thin = thin_svd(adapter[b.name].astype("f8"), adapter[a.name].astype("f8"))
            out[a.name], out[b.name] = split(thin, rank, scale=1.0, mode="sqrt")
    return out


def mean_over_holders(
    adapter: Tensors,
    space: AdapterSpace,
    contributions: Iterable[Contribution],
    weighting: Weighting,
) -> Tensors:
    """Every tensor averaged over the devices that trained it; others keep their value.

    A and B are averaged separately, so the product of the means is not the mean of the products.

    Args:
        adapter: The global adapter before the round.
        space: The model's adapter tensors.
        contributions: Updates, each at the ranks of the global adapter; read once.
        weighting: How devices count.
    """
    mean = HolderMean(shapes_of(adapter))
    for contribution in contributions:
        for name, values in sent_tensors(space, contribution).items():
            mean.add(name, values, device_weight(contribution, weighting))
    return mean.finish(adapter)


def sent_tensors(space: AdapterSpace, contribution: Contribution) -> Tensors:
    """What a device sent of the tensors it was asked to train."""
    trained = (tensor.name for tensor in trained_tensors(space, contribution.assignment))
    return {n: contribution.tensors[n] for n in trained if n in contribution.tensors}


def shapes_of(tensors: Mapping[str, Float32]) -> dict[str, tuple[int, ...]]:
    """Shape by name."""
    return {name: values.shape for name, values in tensors.items()}


def outside_pairs(space: AdapterSpace) -> tuple[str, ...]:
    """Names of the tensors that are averaged entry by entry by every method: head, biases, ..."""
    return tuple(t.name for t in space.tensors if t.role not in ("lora_A", "lora_B"))


def checked_rank(rank: int, space: AdapterSpace) -> int:
    """A configured rank, where 0 stands for the largest.

    Raises:
        ValueError: The rank is above what the space offers.
    """
    if rank > space.max_rank:
        raise ValueError(
            f"rank {rank} is above the run's largest rank {space.max_rank}; raise max_rank"
        )
    return rank or space.max_rank
