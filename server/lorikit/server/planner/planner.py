# SPDX-License-Identifier: Apache-2.0
"""From what a device can do to what it is asked to do, or a refusal that says what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from lorikit.proto.device import Profile
from lorikit.server.methods.base import Assignment, Participant
from lorikit.server.planner.choice import Choice, DoesNotFitError
from lorikit.server.planner.corrections import MemoryCorrections
from lorikit.server.planner.device import Device, MemoryModel, Peaks
from lorikit.server.planner.reasons import bound_by, refusal
from lorikit.server.planner.step import StepShape

MEASURED_SAFETY = 0.98
"""Share of a memory limit that a plan may fill where the class has reported measured peaks."""

ENOUGH_TOKENS = 256
"""Tokens in a micro-batch beyond which a larger one is no faster on a CPU; measured on two
cores."""

ALL_PRECISIONS = ("fp32", "fp16", "int8", "nf4", "int4")
"""What a run may allow; see ``RunConfig.precisions``."""

FAST_PRECISIONS = frozenset({"int4"})
"""Precisions that have ``fast`` kernels, which hold a second copy of the weights."""


class Planner:
    """Turns profiles into limits for methods, and assignments into the fastest plan that fits."""

    def __init__(
        self,
        compiler: MemoryModel,
        *,
        precisions: Sequence[str] = ("fp32", "fp16", "int8", "nf4"),
        batch_size: int,
        max_length: int,
        max_rank: int,
        safety: float = 0.95,
        corrections: MemoryCorrections | None = None,
        class_precisions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Args.

        Args:
            compiler: Knows the memory of every variant.
            precisions: Allowed precisions of the base, the best quality first.
            batch_size: Examples per optimiser step.
            max_length: Tokens of the longest example.
            max_rank: Rank of the global adapter.
            safety: Share of a device's memory limit that a plan may fill; ``MEASURED_SAFETY`` where
                the class has reported measured peaks.
            corrections: What earlier reports taught; predictions are scaled by it.
            class_precisions: Allowed precisions of some device classes instead of those of all.
        """
        self._compiler = compiler
        self._precisions = tuple(precisions)
        self._class_precisions = dict(class_precisions or {})
        self._batch_size = batch_size
        self._max_length = max_length
        self._max_rank = max_rank
        self._safety = safety
        self._corrections = corrections or MemoryCorrections()
        self._peaks = Peaks(compiler)

    def participant(
        self,
        device_id: str,
        profile: Profile,
        local: Mapping[str, float],
        seconds_per_step: float | None = None,
    ) -> Participant:
        """The device's limits as methods see them.

        Args:
            device_id: Stable name of the device.
            profile: What it reports.
            local: What the method remembers of it.
            seconds_per_step: Measured seconds of a full-depth step, where known.

        Raises:
            DoesNotFitError: Not even the last layer at rank 1 fits.
        """
        device = self._device(profile)
        layers = self._compiler.layer_count
        everything = tuple(range(layers))

        def fits(rank: int, depth: int, kept: tuple[int, ...]) -> bool:
            return self._fits(device, self._full(device, rank, layers - depth, kept))

        max_depth = _largest(layers, lambda depth: fits(1, depth, everything))
        max_layers = _largest(layers, lambda count: fits(1, layers, everything[-count:]))
        if not max_depth and not max_layers:
            raise _refusal(
                device,
                self._full(device, 1, layers - 1, everything),
                self._full(device, 1, 0, everything[-1:]),
            )
        ranks = [*self._ranks()]
        place = _largest(len(ranks), lambda n: fits(ranks[n - 1], max_depth, everything))
        return Participant(
            device_id=device_id,
            device_class=profile.device_class,
            memory_limit_bytes=profile.memory_limit_bytes,
            max_rank=ranks[max(place, 1) - 1],
            max_depth=max_depth,
            max_layers=max_layers,
            seconds_per_step=seconds_per_step
            or device.seconds(self._full(device, self._max_rank, 0, everything)),
            local=local,
        )

    def choose(self, profile: Profile, assignment: Assignment) -> Choice:
        """The fastest plan for an assignment that fits.

        Precisions whose base takes at most ``WEIGHTS_SHARE`` of the limit come first; the others
        only where none of these fits. Levers are precision, kernels, micro-batch (up to
        ``ENOUGH_TOKENS``) and the number of recomputed layers.

        Raises:
            DoesNotFitError: The assignment fits in no precision.
        """
        device = self._device(profile)
        full = self._full(
            device,
            max(assignment.ranks.values(), default=1),
            lowest_trained_layer(assignment, self._compiler.layer_count),
            tuple(assignment.kept_layers),
        )
        light = [precision for precision in device.precisions if device.is_light(precision)]
        heavy = [precision for precision in device.precisions if precision not in light]
        for precisions in (light, heavy):
            found = self._fastest(device, full, precisions)
            if found is not None:
                return self._choice(device, found)
        raise _refusal(device, full)

    def _full(self, device: Device, rank: int, lowest: int, kept: tuple[int, ...]) -> StepShape:
        """A step with every lever of the planner's own at its fullest."""
        return StepShape(
            precision=device.precisions[0],
            lowest_trained_layer=lowest,
            kept_layers=kept,
            rank=rank,
            micro_batch=self._largest_micro_batch(),
            length=self._max_length,
        )

    def _fastest(
        self, device: Device, full: StepShape, precisions: Sequence[str]
    ) -> StepShape | None:
        best: StepShape | None = None
        for family in sorted(self._families(full, precisions), key=device.seconds):
            if best and device.seconds(family) >= device.seconds(best):
                break
            found = _least_recomputed(device, family)
            if found and (best is None or device.seconds(found) < device.seconds(best)):
                best = found
        return best

    def _families(self, full: StepShape, precisions: Sequence[str]) -> Iterator[StepShape]:
        """Every setting without recomputation; those that are to win a tie first."""
        for precision in precisions:
            for kernels in ("fast", "lean") if precision in FAST_PRECISIONS else ("lean",):
                micro_batch = full.micro_batch
                while micro_batch:
                    yield replace(
                        full, precision=precision, kernels=kernels, micro_batch=micro_batch
                    )
                    micro_batch //= 2

    def _choice(self, device: Device, chosen: StepShape) -> Choice:
        return Choice(
            precision=chosen.precision,
            micro_batch=chosen.micro_batch,
            predicted_peak_memory_bytes=device.peak(chosen),
            memory_factor=device.memory_factor,
            runtime=_runtime(device.profile),
            recomputed_layers=chosen.recomputed_layers,
            kernels=chosen.kernels,
            seconds_per_step=device.seconds(chosen),
            bound=bound_by(device, chosen, self._largest_micro_batch()),
        )

    def _device(self, profile: Profile) -> Device:
        is_measured = self._corrections.is_measured(profile.device_class)
        return Device(
            self._compiler,
            self._peaks,
            profile,
            self._corrections,
            precisions=self._class_precisions.get(profile.device_class, self._precisions),
            batch_size=self._batch_size,
            safety=max(self._safety, MEASURED_SAFETY) if is_measured else self._safety,
        )

    def _largest_micro_batch(self) -> int:
        tokens = self._compiler.tokens(self._max_length)
        return min(self._batch_size, max(1, -(-ENOUGH_TOKENS // tokens)))

    def _ranks(self) -> Iterator[int]:
        rank = 1
        while rank < self._max_rank:
            yield rank
            rank *= 2
        yield self._max_rank

    def _fits(self, device: Device, full: StepShape) -> bool:
        """Whether the leanest plan of any precision fits."""
        by_size = sorted(device.precisions, key=self._compiler.base_bytes)
        return any(device.fits(_leanest(full, precision)) for precision in by_size)


def lowest_trained_layer(assignment: Assignment, layer_count: int) -> int:
    """Layer at which backward stops; ``layer_count`` when only the head trains."""
    return min(assignment.trained_layers, default=layer_count)


def _leanest(full: StepShape, precision: str) -> StepShape:
    return replace(full, precision=precision, micro_batch=1, recomputed_layers=full.trained_layers)


def _refusal(device: Device, *full: StepShape) -> DoesNotFitError:
    others = [precision for precision in ALL_PRECISIONS if precision not in device.precisions]
    return refusal(
        device,
        [_leanest(step, precision) for step in full for precision in device.precisions],
        [_leanest(step, precision) for step in full for precision in others],
    )


def _least_recomputed(device: Device, family: StepShape) -> StepShape | None:
    """The member of a family that fits with the fewest recomputed layers, the lowest first."""
    layers = family.trained_layers

    def sparing(count: int) -> StepShape:
        return replace(family, recomputed_layers=layers[: len(layers) - count])

    if not device.fits(sparing(0)):
        return None
    return sparing(_largest(len(layers), lambda count: device.fits(sparing(count))))


def _largest(count: int, holds: Callable[[int], bool]) -> int:
    """The largest of 1..count for which a condition holds that only smaller ones meet; or 0."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _runtime(profile: Profile) -> str:
    """Runtime whose graphs the device's preferred engine runs."""
    preferred = profile.engines[0].name if profile.engines else "onnx"
    return "onnx-training" if preferred == "onnx-training" else "onnx"
