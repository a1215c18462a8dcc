# SPDX-License-Identifier: Apache-2.0
"""Training without gradients: two forward passes tell the slope along a random direction.

Its memory is that of a forward pass. A direction is made again from its number whenever it is
needed, one tensor at a time, and never stored.

Source:
    See ``lorikit.proto.directions``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lorikit.proto.directions import direction, moved
from lorikit.proto.plan import Phase
from lorikit.proto.tensors import Tensors
from lorikit.sdk.engines.base import Evaluation


def drawn_directions(phase: Phase, step: int) -> list[int]:
    """Numbers of the directions of one step: from the phase's pool, or each used once."""
    count, pool = phase.optimizer.directions, phase.optimizer.seeds
    if not pool:
        return list(range(step * count, (step + 1) * count))
    rng = np.random.default_rng([phase.seed, step])
    return [int(number) for number in rng.integers(0, pool, count)]


def perturbed(adapter: Tensors, phase: Phase, number: int, distance: float) -> Tensors:
    """The adapter with the phase's tensors moved along a direction; the argument stays as it is."""
    return {
        name: moved(value, direction(phase.seed, number, name, value.shape), distance)
        if name in phase.train
        else value
        for name, value in adapter.items()
    }


def slope(
    loss: Callable[[Tensors], Evaluation], adapter: Tensors, phase: Phase, number: int
) -> tuple[float, Evaluation]:
    """Change of the loss per unit along a direction, and the mean of the two evaluations.

    Args:
        loss: Loss of the step's examples with an adapter.
        adapter: Every adapter tensor.
        phase: Which tensors move, and how far the evaluations stand from the adapter.
        number: Of the direction.
    """
    distance = phase.optimizer.perturbation
    up = loss(perturbed(adapter, phase, number, distance))
    down = loss(perturbed(adapter, phase, number, -distance))
    mean = Evaluation((up.loss + down.loss) / 2, (up.correct + down.correct) / 2)
    return (up.loss - down.loss) / (2 * distance), mean


def moves(slopes: Sequence[tuple[int, float]], learning_rate: float) -> list[tuple[int, float]]:
    """How far a step goes along each of its directions: against the slope, their mean in all.

    Distances are rounded to float32, so that whoever replays them gets the same bits.
    """
    share = learning_rate / len(slopes)
    return [(number, float(np.float32(-share * value))) for number, value in slopes]
