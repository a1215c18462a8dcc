# SPDX-License-Identifier: Apache-2.0
"""Random directions that both ends can make from a number, and moves along them.

A device without memory for gradients measures how its loss changes along a direction and moves
along it. Whoever knows the direction's number makes the same direction again, so the number and
one scalar stand for a change of the whole adapter.

Each element is +1 or -1 with equal chance. The paper draws it from the standard normal; signs have
the same covariance, so the estimate is unbiased to the same order, and they come out equal bit for
bit on every processor, which logarithms and cosines do not.

Source:
    Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes" (MeZO),
    https://arxiv.org/abs/2305.17333, algorithm 1; Spall 1992, "Multivariate Stochastic
    Approximation Using a Simultaneous Perturbation Gradient Approximation", for the signs; Qin et
    al. 2023, "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
    Cost under 18 Kilobytes" (FedKSeed), https://arxiv.org/abs/2312.06353, for the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from lorikit.proto.tensors import Float32, Tensors

SEED_SCALARS = "statistics.seed_scalars"
"""Tensor that a forward-only phase can send: float32 [moves, 2], each row a direction's number
and how far the adapter went along it; numbers stay below
``plan.MOST_DIRECTIONS``."""


def direction(phase_seed: int, number: int, name: str, shape: tuple[int, ...]) -> Float32:
    """The part of a direction that belongs to one tensor: elements of +1 and -1.

    Args:
        phase_seed: Seed of the phase; devices of equal seed have equal directions.
        number: Which direction, from 0.
        name: Of the tensor.
        shape: Of the tensor.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    size = int(np.prod(shape, dtype=np.int64))
    words = np.random.PCG64(np.random.SeedSequence([phase_seed, number, key])).random_raw(
        -(-size // 64)
    )
    octets = np.asarray(words, dtype="<u8").reshape(-1).view(np.uint8)
    bits = np.unpackbits(octets, count=size, bitorder="little")
    signs: Float32 = bits.astype(np.float32)
    signs *= 2
    signs -= 1
    return signs.reshape(shape)


def moved(tensor: Float32, signs: Float32, distance: float) -> Float32:
    """A tensor after a move along its part of a direction."""
    result: Float32 = tensor + np.float32(distance) * signs
    return result


def replayed(
    tensors: Tensors,
    moves: Iterable[tuple[int, float]],
    *,
    phase_seed: int,
    factors: Mapping[str, float],
) -> Tensors:
    """The tensors after all moves: what the device has, bit for bit.

    Args:
        tensors: What trained, as the device received it, float32.
        moves: Rows of ``SEED_SCALARS``, in order.
        phase_seed: Of the phase.
        factors: Learning-rate factor by name; 1 where absent.
    """
    result = dict(tensors)
    for number, distance in moves:
        for name, tensor in result.items():
            signs = direction(phase_seed, int(number), name, tensor.shape)
            result[name] = moved(tensor, signs, float(distance) * factors.get(name, 1.0))
    return result
