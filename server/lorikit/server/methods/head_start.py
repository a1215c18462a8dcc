# SPDX-License-Identifier: Apache-2.0
"""A first round without training, which sets the task head from class means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lorikit.proto.manifest import AdapterTensor
from lorikit.proto.plan import Operation, Value
from lorikit.proto.tensors import Tensors
from lorikit.server.methods.adapters import every_layer, leading_ranks, same_ranks
from lorikit.server.methods.base import (
    AdapterSpace,
    Assignment,
    Contribution,
    Method,
    Participant,
    State,
)

Float64 = npt.NDArray[np.float64]

CLASS_SUMS = "statistics.class_sums"
"""Tensor that the operation ``class_sums`` sends: sum of the head's inputs, [classes, width]."""
CLASS_COUNTS = "statistics.class_counts"
"""Tensor that it sends beside it: number of examples, [classes]."""
MOMENTS = "statistics.moments"
"""Tensor that it sends for the rule ``discriminant``: sum of f f^T, [width, width]."""

_KEY = "head_start"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStartConfig:
    """How a head is made from class means."""

    rule: Literal["cosine", "nearest-mean", "discriminant"] = "cosine"
    """``cosine``: every class has a row of the same length; ``nearest-mean``: the class whose mean
    is nearest wins; ``discriminant``: nearest in the metric of the classes' common covariance, for
    [width, width] more numbers per device, once."""
    shrinkage: float = 0.001
    """Share of a multiple of the identity in that covariance; in (0, 1]."""
    confidence: float = 0.9
    """Mean probability that the head gives a class at its own mean; in (0, 1). Sets the scale of
    the logits. 0.9 was near the smallest test loss for MiniLM on CLINC150 (measured: 1.04, at
    0.75 accuracy before any training)."""
    scale: float = 0.0
    """kappa, if it shall not follow from ``confidence``; 0 otherwise."""
    max_examples: int = 0
    """Most examples a device looks at; 0 for all."""

    def __post_init__(self) -> None:
        if self.rule not in ("cosine", "nearest-mean", "discriminant"):
            raise ValueError(
                f"rule must be 'cosine', 'nearest-mean' or 'discriminant', got {self.rule!r}"
            )
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in (0, 1], got {self.shrinkage}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), got {self.confidence}")
        if not (self.scale >= 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale must be at least 0 and finite, got {self.scale}")
        if self.max_examples < 0:
            raise ValueError(f"max_examples must be at least 0, got {self.max_examples}")


class HeadStart:
    """Puts one round of class sums before any method.

    In the first round devices send, per class, the sum of the head's input features under the
    initial adapter, and the number of examples. With ``mu_c`` the class means over all devices,
    ``mu`` their plain mean and ``d_c = mu_c - mu``, the head becomes

        cosine:        w_c = kappa d_c / ||d_c||     b_c = - w_c . mu
        nearest-mean:  w_c = kappa d_c               b_c = - kappa (||mu_c||^2 - ||mu||^2) / 2
        discriminant:  w_c = kappa C^-1 d_c          b_c = - w_c . (mu_c + mu) / 2

    with the shrunk common covariance C = (1 - g) S + g tr(S)/width I,
    S = (sum f f^T - sum_c n_c mu_c mu_c^T) / n.

    The first gives logits ``kappa u_c . (f - mu)``; the second gives ``-kappa/2 ||f - mu_c||^2``
    up to a term that is the same for all classes. A class that no device has gets ``w_c = 0`` and
    ``b_c = 0``: it stands at the mean of all classes. Class means, unlike gradients, do not suffer
    from devices that see few classes: the result is that of pooled data.

    A device that cannot hold the whole model (FedRA) sends sums of its sub-model's features, which
    are not those of the model: they count only if no device holds the whole.

    The third is linear discriminant analysis, exactly that of pooled data (measured for MiniLM on
    CLINC150, all examples, before any training: 0.87 accuracy against 0.75 for ``cosine``).

    Devices send sums over their own examples; a class with one example on a device reveals that
    example's features. Wrap the other way round than ``ServerOptimizer``: this one outside.

    Source:
        Legate et al. 2023, "Guiding The Last Layer in Federated Learning with Pre-Trained Models",
        https://arxiv.org/abs/2306.03937 (FedNCM). Subtracting the mean and choosing kappa are ours.
    """

    def __init__(self, method: Method, config: HeadStartConfig | None = None) -> None:
        """Wrap a method."""
        self.method = method
        self.config = config or HeadStartConfig()

    @property
    def name(self) -> str:
        """Name of the wrapped method."""
        return self.method.name

    def start(self, space: AdapterSpace, initial: Tensors) -> State:
        """State of the wrapped method, waiting for the class sums.

        Raises:
            ValueError: The model's head is not one linear map.
        """
        linear_head(space)
        state = self.method.start(space, initial)
        return _marked(state, is_waiting=True, rounds=0)

    def assign(
        self,
        state: State,
        space: AdapterSpace,
        round_number: int,
        cohort: Sequence[Participant],
        rng: np.random.Generator,
    ) -> tuple[Assignment, ...]:
        """Class sums from everybody at first, then what the wrapped method assigns."""
        if is_waiting(state):
            return tuple(self._class_sums(state, space, device) for device in cohort)
        rounds = round_number - _rounds(state)
        return self.method.assign(state, space, rounds, cohort, rng)

    def broadcast(self, state: State, space: AdapterSpace, assignment: Assignment) -> Tensors:
        """The start adapter for class sums, then what the wrapped method sends."""
        if is_waiting(state):
            adapter = self.method.global_adapter(state, space)
            return leading_ranks(adapter, space, assignment.ranks, assignment.kept_layers)
        return self.method.broadcast(state, space, assignment)

    def aggregate(
        self, state: State, space: AdapterSpace, contributions: Iterable[Contribution]
    ) -> State:
        """The head from the class sums, or the wrapped method's aggregate."""
        if not is_waiting(state):
            return self.method.aggregate(state, space, contributions)
        weight, bias = linear_head(space)
        wants_moments = self.config.rule == "discriminant"
        sums, counts, moments = _totals(space, weight, contributions, wants_moments)
        rounds = _rounds(state) + 1
        if not counts.any():
            return _marked(state, is_waiting=True, rounds=rounds)
        w, b = head_from_means(
            sums, counts, self.config, moments=moments, with_bias=bias is not None
        )
        head = {weight.name: w.astype(np.float32)}
        if bias is not None:
            head[bias.name] = b.astype(np.float32)
        started = replace(state, tensors={**state.tensors, **head})
        return _marked(started, is_waiting=False, rounds=rounds)

    def global_adapter(self, state: State, space: AdapterSpace, rank: int | None = None) -> Tensors:
        """The wrapped method's adapter."""
        return self.method.global_adapter(state, space, rank)

    def _class_sums(self, state: State, space: AdapterSpace, device: Participant) -> Assignment:
        """Class sums with all layers, or with as many as a device can hold that never holds all.

        Rank 1 suffices while B is 0 everywhere.
        """
        adapter = self.method.global_adapter(state, space)
        is_zero = not any(adapter[b.name].any() for _, b in space.pairs())
        full = {a.module: adapter[a.name].shape[0] for a, _ in space.pairs()}
        arguments: dict[str, Value] = {"max_examples": self.config.max_examples}
        if self.config.rule == "discriminant":
            arguments["second_moments"] = True
        operation = Operation(
            name="class_sums",
            arguments=arguments,
        )
        layers = every_layer(space)
        if device.max_depth < 1:
            layers = layers[space.layer_count - min(device.max_layers, space.layer_count) :]
        ranks = same_ranks(space, 1) if is_zero else full
        held = same_ranks(space, 1, layers)
        return Assignment(
            device_id=device.device_id,
            ranks={module: ranks[module] for module in held},
            trained_layers=(),
            kept_layers=layers,
            train_head=False,
            operations=(operation,),
            train=False,
        )


def is_waiting(state: State) -> bool:
    """Whether the next round asks for class sums."""
    return bool(state.extra.get(_KEY, {}).get("is_waiting", False))


def linear_head(space: AdapterSpace) -> tuple[AdapterTensor, AdapterTensor | None]:
    """Weight [classes, width] and bias [classes] of a head that is one linear map.

    Raises:
        ValueError: The head is something else.
    """
    head = space.named("head")
    weights = [tensor for tensor in head if len(tensor.shape) == 2]
    biases = [tensor for tensor in head if len(tensor.shape) == 1]
    if len(weights) != 1 or len(head) != 1 + len(biases) or len(biases) > 1:
        names = ", ".join(tensor.name for tensor in head) or "nothing"
        raise ValueError(
            f"class means need a head of one linear map, this model's is {names}; "
            "run without the head start"
        )
    return weights[0], biases[0] if biases else None


def head_from_means(
    sums: Float64,
    counts: Float64,
    config: HeadStartConfig,
    *,
    moments: Float64 | None = None,
    with_bias: bool = True,
) -> tuple[Float64, Float64]:
    """Weight and bias of the head.

    Args:
        sums: Sum of the features by class, [classes, width].
        counts: Examples by class, [classes]; 0 where nobody has the class, but not everywhere.
        config: Rule and scale.
        moments: Sum of f f^T over all examples, [width, width]; for ``discriminant`` only.
        with_bias: False for a head without bias, whose rows are then made from the means as they
            are, without subtracting their mean.

    Returns:
        Weight [classes, width] and bias [classes]; the bias is 0 without one.
    """
    seen = counts > 0
    means = sums[seen] / counts[seen, None]
    centre = means.mean(axis=0) if with_bias else np.zeros(sums.shape[1])
    rows = means - centre
    if config.rule == "cosine":
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
        shifts = -rows @ centre
    elif config.rule == "discriminant":
        if moments is None:
            raise ValueError("the rule 'discriminant' needs second moments")
        covariance = shrunk_covariance(sums, counts, moments, config.shrinkage)
        rows = np.linalg.solve(covariance, rows.T).T
        shifts = -np.sum(rows * (means + centre), axis=1) / 2
    else:
        shifts = -(np.sum(means**2, axis=1) - np.sum(centre**2)) / 2
    shifts = shifts if with_bias else np.zeros_like(shifts)
    kappa = config.scale or scale_for(means @ rows.T + shifts, config.confidence)
    weight, bias = np.zeros(sums.shape), np.zeros(len(counts))
    weight[seen], bias[seen] = kappa * rows, kappa * shifts
    return weight, bias


def shrunk_covariance(
    sums: Float64, counts: Float64, moments: Float64, shrinkage: float
) -> Float64:
    """Common covariance of the classes, [width, width], mixed with a multiple of the identity.

    Args:
        sums: Sum of the features by class, [classes, width].
        counts: Examples by class, [classes].
        moments: Sum of f f^T over all examples, [width, width].
        shrinkage: Weight of the identity, in (0, 1].
    """
    seen = counts > 0
    between = (sums[seen] / counts[seen, None]).T @ sums[seen]
    within = (moments - between) / counts.sum()
    width = len(within)
    level = max(float(np.trace(within)) / width, 1e-12)
    shrunk: Float64 = (1 - shrinkage) * within + shrinkage * level * np.eye(width)
    return shrunk


def scale_for(logits: Float64, confidence: float) -> float:
    """The scale at which the mean probability of the own class reaches ``confidence``.

    Args:
        logits: Logit of each class (columns) at each class's mean (rows), at scale 1.
        confidence: Wanted mean of the diagonal of the row-wise softmax.

    Returns:
        The scale, by bisection between 1e-3 and 1e4; an end of that range if it lies outside, and
        1 if there is one class only.
    """
    if len(logits) < 2:
        return 1.0
    margins = logits - np.diag(logits)[:, None]
    low, high = 1e-3, 1e4
    for _ in range(60):
        middle = math.sqrt(low * high)
        odds = np.exp(np.minimum(middle * margins, 700.0)).sum(axis=1)
        low, high = (middle, high) if np.mean(1 / odds) < confidence else (low, middle)
    return low


def _totals(
    space: AdapterSpace,
    weight: AdapterTensor,
    contributions: Iterable[Contribution],
    wants_moments: bool,
) -> tuple[Float64, Float64, Float64]:
    """Sums, counts and moments over the devices with the whole model; over all where none has it.

    Raises:
        ValueError: An update lacks a tensor, or one is of another shape or negative.
    """
    classes, width = (int(length) for length in weight.shape)
    square = (width, width) if wants_moments else (0, 0)
    whole = np.zeros((classes, width)), np.zeros(classes), np.zeros(square)
    partial = np.zeros((classes, width)), np.zeros(classes), np.zeros(square)
    for contribution in contributions:
        has_all = len(contribution.assignment.kept_layers) == space.layer_count
        sums, counts, moments = whole if has_all else partial
        wanted = [(CLASS_SUMS, sums), (CLASS_COUNTS, counts)]
        if wants_moments:
            wanted.append((MOMENTS, moments))
        for name, total in wanted:
            part = contribution.tensors.get(name)
            if part is None or part.shape != total.shape:
                shape = None if part is None else part.shape
                raise ValueError(
                    f"{contribution.device_id}: {name} has shape {shape}, not {total.shape}"
                )
            if name == CLASS_COUNTS and part.min(initial=0.0) < 0:
                raise ValueError(f"{contribution.device_id}: {name} holds a negative count")
            total += part
    return whole if whole[1].any() else partial


def _rounds(state: State) -> int:
    """Rounds that went into class sums so far."""
    return int(state.extra.get(_KEY, {}).get("rounds", 0))


def _marked(state: State, *, is_waiting: bool, rounds: int) -> State:
    mark = {"is_waiting": is_waiting, "rounds": rounds}
    return replace(state, extra={**state.extra, _KEY: mark})
