# SPDX-License-Identifier: Apache-2.0
"""Why a plan is what it is, and why there is none, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lorikit.server.planner.choice import DoesNotFitError
from lorikit.server.planner.device import WEIGHTS_SHARE, Device
from lorikit.server.planner.step import StepShape

MEBIBYTE = 1 << 20

SHORTEST_LENGTH = 8
"""Tokens below which a shorter input is no remedy."""


def bound_by(device: Device, chosen: StepShape, largest_micro_batch: int) -> str:
    """Each lever that stands lower than it could, and by how much the next setting misses.

    Args:
        device: Whose limit it is.
        chosen: The plan.
        largest_micro_batch: That the planner would take.
    """
    reasons = []
    recomputed, layers = len(chosen.recomputed_layers), chosen.trained_layers
    if recomputed:
        fewer = replace(chosen, recomputed_layers=layers[: recomputed - 1])
        reasons.append(
            f"recomputing {recomputed} of {len(layers)} layers "
            f"({recomputed - 1} would need {device.excess(fewer)})"
        )
    if chosen.micro_batch < largest_micro_batch:
        wider = replace(chosen, micro_batch=min(2 * chosen.micro_batch, largest_micro_batch))
        if not device.fits(wider):
            reasons.append(
                f"micro-batch {chosen.micro_batch} "
                f"({wider.micro_batch} would need {device.excess(wider)})"
            )
    reasons.extend(_faster_base(device, chosen))
    return "; ".join(reasons)


def _faster_base(device: Device, chosen: StepShape) -> Iterator[str]:
    """Why not the next faster precision."""
    own = device.seconds(chosen)
    others = [
        replace(chosen, precision=precision, kernels="lean")
        for precision in device.precisions
        if precision != chosen.precision
    ]
    faster = [other for other in others if device.seconds(other) < own]
    if not faster:
        return
    other = max(faster, key=device.seconds)
    if not device.fits(other):
        yield f"{chosen.precision} base ({other.precision} would need {device.excess(other)})"
    elif not device.is_light(other.precision):
        share = f"{WEIGHTS_SHARE:.0%} of the limit"
        yield f"{chosen.precision} base (that of {other.precision} takes more than {share})"


def refusal(
    device: Device, plans: Sequence[StepShape], forbidden: Sequence[StepShape] = ()
) -> DoesNotFitError:
    """Why nothing fits, with the smallest changes that would help, one of each kind.

    Args:
        device: That is refused.
        plans: The leanest plans, of which none fits.
        forbidden: The same in precisions that the run does not allow.
    """
    smallest = min(plans, key=device.peak)
    limit = device.profile.memory_limit_bytes
    reason = (
        f"The smallest plan ({smallest.precision}, rank {smallest.rank}, "
        f"{_count(len(smallest.kept_layers), 'layer')}, trained from layer "
        f"{smallest.lowest_trained_layer}, micro-batch {smallest.micro_batch} x "
        f"{smallest.length} tokens) needs {device.peak(smallest) / MEBIBYTE:.0f} MiB; the device "
        f"allows {limit / MEBIBYTE:.0f} MiB."
    )
    remedies = [*_shorter(device, smallest), *_other_base(device, forbidden)]
    needed = device.peak(smallest) * limit / device.budget_bytes / MEBIBYTE
    remedies.append(f"allow the app {needed:.0f} MiB")
    text = ", or ".join(remedies)
    return DoesNotFitError(reason, f"{text[0].upper()}{text[1:]}.")


def _shorter(device: Device, plan: StepShape) -> Iterator[str]:
    """The longest inputs that would fit, if any of a length worth training on do."""
    length = plan.length // 2
    while length >= SHORTEST_LENGTH:
        if device.fits(replace(plan, length=length)):
            yield f"set max_length to {length}"
            return
        length //= 2


def _other_base(device: Device, plans: Sequence[StepShape]) -> Iterator[str]:
    """A precision that would fit, if the run allowed it."""
    fitting = [plan for plan in plans if device.fits(plan)]
    if fitting:
        yield f"allow the precision {max(fitting, key=device.peak).precision}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
