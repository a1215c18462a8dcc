# SPDX-License-Identifier: Apache-2.0
"""The self-check: does this engine, on this processor, compute what torch + PEFT computed?

A package carries one small batch with the loss and gradients that the server's reference gave for
it. Runtimes differ by version and processor; one that is wrong would spoil a round silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorikit.proto.tensors import Bundle, Encoded, Float32, MalformedTensorError, Tensors, unpack
from lorikit.sdk._errors import EngineDisagreesError, PackageError
from lorikit.sdk._optimizer import global_norm
from lorikit.sdk.engines._signature import DROPOUT_SEED, GRADIENT_SUFFIX, WHOLE_NUMBERS
from lorikit.sdk.engines.base import Batch, Gradients

TOLERANCE = 1e-3
"""Largest relative error of the loss and of each gradient (Frobenius norm)."""

NEGLIGIBLE = 1e-3
"""Gradients below this share of the joint norm are compared with that share instead of their own
norm: one that is zero in exact arithmetic has no relative error."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One batch and what must come out of it."""

    adapter: Tensors
    batch: Batch
    inputs: Mapping[str, float]
    """Scalar inputs; the seed of dropout is 0 where the bundle names none."""
    loss: float
    gradients: Tensors


def parse_probe(data: bytes) -> Probe:
    """Read a probe bundle.

    Raises:
        PackageError: Not a bundle, or one without a batch or expectations.
    """
    try:
        bundle = unpack(data)
        batch = _part(bundle, "batch.", "")
        return Probe(
            adapter=_part(bundle, "adapter.", ""),
            batch=Batch(
                inputs={
                    name: value.astype(np.int64) if name in WHOLE_NUMBERS else value
                    for name, value in batch.items()
                    if name not in ("labels", "weights")
                },
                labels=batch["labels"].astype(np.int64),
                weights=batch["weights"],
            ),
            inputs={
                DROPOUT_SEED: 0,
                **{
                    name.removeprefix("input."): value
                    for name, value in bundle.scalars.items()
                    if name.startswith("input.")
                },
            },
            loss=bundle.scalars["expected.loss"],
            gradients=_part(bundle, "expected.", GRADIENT_SUFFIX),
        )
    except (MalformedTensorError, KeyError) as error:
        raise PackageError(f"the package's probe cannot be read: {error}") from error


def check_probe(
    probe: Probe,
    run: Callable[[Tensors, Batch, Mapping[str, float]], Gradients],
    *,
    is_whole: bool,
) -> None:
    """Run the probe and compare.

    Args:
        probe: From ``parse_probe``.
        run: The engine's ``gradients``.
        is_whole: Whether the batch is one run: a graph with dropout draws by place in the batch.
            Otherwise an example is a run, so that the check takes no more memory than training.

    Raises:
        EngineDisagreesError: The loss or a gradient is too far off; names it and its error.
    """
    batches = [probe.batch] if is_whole else _examples(probe.batch)
    results = [run(probe.adapter, batch, probe.inputs) for batch in batches]
    loss = sum(result.loss for result in results)
    error = abs(loss - probe.loss) / max(abs(probe.loss), 1e-12)
    if not error <= TOLERANCE:
        raise EngineDisagreesError(_sentence("the loss", error))
    floor = NEGLIGIBLE * global_norm(probe.gradients.values())
    for name, expected in probe.gradients.items():
        error = _relative_error(_sum(name, results), expected, floor)
        if not error <= TOLERANCE:
            raise EngineDisagreesError(_sentence(f"the gradient of {name}", error))


def _examples(batch: Batch) -> list[Batch]:
    """Each example as a batch; their losses sum to that of the whole."""
    return [
        Batch(
            inputs={name: value[n : n + 1] for name, value in batch.inputs.items()},
            labels=batch.labels[n : n + 1],
            weights=batch.weights[n : n + 1],
        )
        for n in range(len(batch.labels))
    ]


def _sum(name: str, results: Sequence[Gradients]) -> Float32 | None:
    """A gradient over all runs; None if a run lacks it."""
    parts = [result.gradients.get(name) for result in results]
    found = [part for part in parts if part is not None]
    return sum(found[1:], start=found[0]) if len(found) == len(parts) else None


def _relative_error(value: Float32 | None, expected: Float32, floor: float) -> float:
    if value is None or value.shape != expected.shape:
        return float("inf")
    scale = max(global_norm([expected]), floor)
    return global_norm([value - expected]) / scale if scale else global_norm([value])


def _sentence(what: str, error: float) -> str:
    return (
        f"on the package's probe batch {what} is off by {error:.2e} (allowed: {TOLERANCE:.0e}); "
        "this runtime cannot train this package correctly, try another engine or version"
    )


def _part(bundle: Bundle, prefix: str, suffix: str) -> Tensors:
    return {
        name.removeprefix(prefix).removesuffix(suffix): _values(name, encoded)
        for name, encoded in bundle.tensors.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _values(name: str, encoded: Encoded) -> Float32:
    values = encoded.parts.get("values")
    if encoded.codec != "fp32" or values is None or values.shape != encoded.shape:
        raise MalformedTensorError(f"{name}: probe tensors must be fp32, got {encoded.codec!r}")
    return values.astype(np.float32)
