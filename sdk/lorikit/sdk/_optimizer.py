# SPDX-License-Identifier: Apache-2.0
"""Optimisers of the device: pure functions of arrays, with their state in plain sight.

Everything is explicit, so that a journal can hold it and a killed process goes on bit for bit. A
step computes in float32; between steps the state may wait in 8 bits. Numbers follow ``torch.optim``
(same order of operations), except that the weight decay of ``sgd`` is decoupled too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from lorikit.proto.plan import OptimizerConfig
from lorikit.proto.tensors import Array, Float32, Tensors
from lorikit.sdk._states import SMALLEST, dequantized, quantized

Slots = dict[str, Array]
"""What an optimiser remembers of one tensor, by role: float32 in the tensor's shape, or 8-bit
codes in that shape with the scales of their blocks under ``<role>.scale``."""

_IS_SIGNED = {"first": True, "second": False, "momentum": True}
_SCALE = ".scale"


def initial_slots(config: OptimizerConfig, parameter: Float32) -> Slots:
    """Slots of one tensor before its first step: zeros, or nothing for plain SGD."""
    if config.name == "adamw":
        return _kept(
            config, {"first": np.zeros_like(parameter), "second": np.zeros_like(parameter)}
        )
    return _kept(config, {"momentum": np.zeros_like(parameter)}) if config.momentum else {}


def scheduled_learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of one step of a phase.

    The warm-up climbs in equal parts and reaches the full rate at its last step; ``linear`` and
    ``cosine`` then fall from the full rate towards zero, which the step after the last would have.

    Args:
        config: Rate, schedule and warm-up.
        step: Step of the phase, from 0.
        steps: Steps of the phase.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    fraction = (step - warmup) / (steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - fraction)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * fraction))


def global_norm(arrays: Iterable[Float32]) -> float:
    """The l2 norm of all arrays as one long vector, summed in float64."""
    return math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays))


def clip_by_global_norm(gradients: Tensors, max_norm: float) -> tuple[Tensors, float]:
    """Scale gradients so that their joint l2 norm is at most ``max_norm``.

    Args:
        gradients: Arrays by name; unchanged.
        max_norm: Largest norm; zero means no clipping.

    Returns:
        The scaled arrays, and the norm before scaling.

    Source:
        Pascanu et al. 2013, "On the difficulty of training recurrent neural networks",
        https://arxiv.org/abs/1211.5063, section 3.2.
    """
    norm = global_norm(gradients.values())
    if not max_norm or norm <= max_norm:
        return gradients, norm
    scale = np.float32(max_norm / norm)
    return {name: gradient * scale for name, gradient in gradients.items()}, norm


def updated(
    parameter: Float32,
    gradient: Float32,
    slots: Mapping[str, Array],
    config: OptimizerConfig,
    *,
    learning_rate: float,
    step: int,
) -> tuple[Float32, Slots]:
    """One tensor after one step, and its new slots; the arguments stay as they are.

    Args:
        parameter: The tensor, float32.
        gradient: Gradient of the step's loss, in the same shape.
        slots: From ``initial_slots`` or the step before.
        config: Which optimiser, and its constants.
        learning_rate: Rate of this tensor in this step, schedule and factor included.
        step: Steps of the phase done before this one, from 0.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
        https://arxiv.org/abs/1711.05101, algorithms 1 and 2, without the schedule multiplier.
    """
    decayed = parameter * np.float32(1 - learning_rate * config.weight_decay)
    opened = {role: _opened(slots, role) for role in slots if not role.endswith(_SCALE)}
    if config.name == "adamw":
        value, after = _adamw(decayed, gradient, opened, config, learning_rate, step + 1)
    else:
        value, after = _sgd(decayed, gradient, opened, config, learning_rate)
    return value, _kept(config, after)


def _kept(config: OptimizerConfig, slots: dict[str, Float32]) -> Slots:
    """Slots in the form in which they wait for the next step."""
    kept: Slots = {}
    for role, values in slots.items():
        if config.state_bits == 32 or values.size < SMALLEST:
            kept[role] = values
        else:
            kept[role], kept[role + _SCALE] = quantized(values, is_signed=_IS_SIGNED[role])
    return kept


def _opened(slots: Mapping[str, Array], role: str) -> Float32:
    """One slot as float32."""
    values = slots[role]
    if values.dtype == np.uint8:
        scales = np.asarray(slots[role + _SCALE], np.float32)
        return dequantized(values.astype(np.uint8), scales, is_signed=_IS_SIGNED[role])
    return values.astype(np.float32, copy=False)


def mean_squared_gradients(slots: Mapping[str, Slots]) -> dict[str, float]:
    """How much the loss hangs on each tensor: the mean of its second moment, where there is one.

    An estimate of the diagonal of the Fisher information that costs nothing; of one optimiser's
    tensors only the ratios mean something.
    """
    return {
        name: float(_opened(of_tensor, "second").mean(dtype=np.float64))
        for name, of_tensor in slots.items()
        if of_tensor.get("second") is not None and of_tensor["second"].size
    }


def first_order_effects(
    slots: Mapping[str, Slots], before: Tensors, after: Tensors
) -> dict[str, float]:
    """What a tensor's change does to the loss, per squared length of the change.

    The effect is sum |g u| with u the change and g the root of the second moment. An error e of the
    change loses the share |e|^2 / |u|^2 of it, so that sum |g u| / |u|^2 is the weight of |e|^2. Of
    one optimiser's tensors only the ratios mean something.

    Args:
        slots: Optimiser state by tensor; one without a second moment has no effect here.
        before: The tensors before training, by name.
        after: The same after it.
    """
    effects = {}
    for name, of_tensor in slots.items():
        if of_tensor.get("second") is None:
            continue
        change = np.abs(after[name] - before[name]).astype(np.float64)
        squares = float(np.square(change).sum())
        slope = np.sqrt(_opened(of_tensor, "second").astype(np.float64))
        effects[name] = float((slope * change).sum()) / squares if squares else 0.0
    return effects


def _adamw(
    decayed: Float32,
    gradient: Float32,
    slots: Mapping[str, Float32],
    config: OptimizerConfig,
    learning_rate: float,
    count: int,
) -> tuple[Float32, dict[str, Float32]]:
    first = slots["first"] + (gradient - slots["first"]) * np.float32(1 - config.beta1)
    second = slots["second"] * np.float32(config.beta2)
    second += np.square(gradient) * np.float32(1 - config.beta2)
    denominator = np.sqrt(second)
    denominator /= np.float32(math.sqrt(1 - config.beta2**count))
    denominator += np.float32(config.epsilon)
    move = first / denominator
    move *= np.float32(learning_rate / (1 - config.beta1**count))
    return decayed - move, {"first": first, "second": second}


def _sgd(
    decayed: Float32,
    gradient: Float32,
    slots: Mapping[str, Float32],
    config: OptimizerConfig,
    learning_rate: float,
) -> tuple[Float32, dict[str, Float32]]:
    if not config.momentum:
        return decayed - gradient * np.float32(learning_rate), {}
    momentum = slots["momentum"] * np.float32(config.momentum) + gradient
    return decayed - momentum * np.float32(learning_rate), {"momentum": momentum}
