# SPDX-License-Identifier: Apache-2.0
"""From what a device can do to what it is asked to do, or a refusal that says what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lorikit.proto.device import Profile
from lorikit.server.errors import LorikitError
from lorikit.server.methods.base import Assignment, Participant
from lorikit.server.planner.corrections import MemoryCorrections
from lorikit.server.planner.speed import step_seconds

MEBIBYTE = 1 << 20
MEGABYTE = 1_000_000

MEASURED_SAFETY = 0.98
"""Share of a memory limit that a plan may fill where the class has reported measured peaks."""

ENOUGH_TOKENS = 256
"""Tokens in a micro-batch beyond which a larger one is no faster on a CPU; measured on two
cores."""

WEIGHTS_SHARE = 0.08
"""Share of a device's budget that the mapped base may take while a smaller format fits."""

FAST_PRECISIONS = frozenset({"int4"})
"""Precisions that have ``fast`` kernels, which hold a second copy of the weights."""


class DoesNotFitError(LorikitError):
    """No plan fits the device."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Args are one sentence why, and one with the smallest change that would make it fit."""
        super().__init__(f"{reason} {remedy}")
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How an assignment is carried out on one device."""

    precision: str
    micro_batch: int
    predicted_peak_memory_bytes: int
    """With what was learnt of the device's class."""
    memory_factor: float = 1.0
    """What was learnt: the prediction is that of the graph times this factor."""
    runtime: str
    recomputed_layers: tuple[int, ...] = ()
    """Layers whose forward values are made again for the backward pass."""
    kernels: str = "lean"
    """``lean`` or ``fast``; see ``compile.Variant``."""
    seconds_per_step: float = 0.0
    """Estimate for one optimiser step."""
    bound: str = ""
    """Which levers the memory limit pulled, in words; empty where the fastest plan fits."""


class MemoryModel(Protocol):
    """What the planner needs of a compiler."""

    layer_count: int

    def predicted_peak_memory(
        self,
        *,
        precision: str,
        lowest_trained_layer: int,
        kept_layers: Sequence[int] | None,
        rank: int,
        micro_batch: int,
        length: int,
        baseline_bytes: int,
        recomputed_layers: Sequence[int] = (),
        kernels: str = "lean",
    ) -> int:
        """Predicted peak resident bytes of a device process."""
        ...

    def base_bytes(self, precision: str) -> int:
        """Bytes of the whole base at a precision."""
        ...

    def flops_per_token(self, lowest_trained_layer: int, kept_layers: Sequence[int]) -> int:
        """Floating-point operations of a training step per token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What has to fit on a device: an assignment as far as memory and time go."""

    rank: int
    lowest: int
    kept: tuple[int, ...]

    @property
    def trained(self) -> tuple[int, ...]:
        """Layers with a backward part, the lowest first."""
        return tuple(layer for layer in self.kept if layer >= self.lowest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """One setting of the levers that are the planner's own."""

    precision: str
    kernels: str
    micro_batch: int
    recomputed: int = 0
    """The lowest trained layers are recomputed first: each saves the same, the highest nothing."""


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
        self._known: dict[tuple[_Job, _Candidate, int], int] = {}

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
        layers = self._compiler.layer_count
        everything = tuple(range(layers))

        def fits(rank: int, depth: int, kept: tuple[int, ...]) -> bool:
            job = _Job(rank=rank, lowest=layers - depth, kept=kept)
            return self._fits(profile, job)

        max_depth = _largest(layers, lambda depth: fits(1, depth, everything))
        max_layers = _largest(layers, lambda count: fits(1, layers, everything[-count:]))
        if not max_depth and not max_layers:
            raise self._refusal(profile, _Job(rank=1, lowest=layers - 1, kept=everything))
        ranks = [*self._ranks()]
        place = _largest(len(ranks), lambda n: fits(ranks[n - 1], max_depth, everything))
        return Participant(
            device_id=device_id,
            device_class=profile.device_class,
            memory_limit_bytes=profile.memory_limit_bytes,
            max_rank=ranks[max(place, 1) - 1],
            max_depth=max_depth,
            max_layers=max_layers,
            seconds_per_step=seconds_per_step or self._estimated_seconds(profile),
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
        job = _Job(
            rank=max(assignment.ranks.values(), default=1),
            lowest=lowest_trained_layer(assignment, self._compiler.layer_count),
            kept=tuple(assignment.kept_layers),
        )
        for precisions in self._by_preference(profile):
            found = self._fastest(profile, job, precisions)
            if found is not None:
                return self._choice(profile, job, found)
        raise self._refusal(profile, job)

    def _fastest(self, profile: Profile, job: _Job, precisions: Sequence[str]) -> _Candidate | None:
        best: _Candidate | None = None
        for family in sorted(
            self._families(precisions), key=lambda c: self._seconds(profile, job, c)
        ):
            if best and self._seconds(profile, job, family) >= self._seconds(profile, job, best):
                break
            found = self._least_recomputed(profile, job, family)
            if found is None:
                continue
            if best is None or self._seconds(profile, job, found) < self._seconds(
                profile, job, best
            ):
                best = found
        return best

    def _families(self, precisions: Sequence[str]) -> Iterator[_Candidate]:
        """Every setting without recomputation; those that are to win a tie first."""
        for precision in precisions:
            kernels = ("fast", "lean") if precision in FAST_PRECISIONS else ("lean",)
            for kernel in kernels:
                for micro_batch in self._micro_batches():
                    yield _Candidate(precision=precision, kernels=kernel, micro_batch=micro_batch)

    def _least_recomputed(
        self, profile: Profile, job: _Job, family: _Candidate
    ) -> _Candidate | None:
        """The member of a family that fits with the fewest recomputed layers."""
        layers = len(job.trained)
        if not self._is_allowed(profile, job, replace(family, recomputed=layers)):
            return None
        spared = _largest(
            layers, lambda n: self._is_allowed(profile, job, replace(family, recomputed=layers - n))
        )
        return replace(family, recomputed=layers - spared)

    def _choice(self, profile: Profile, job: _Job, chosen: _Candidate) -> Choice:
        return Choice(
            precision=chosen.precision,
            micro_batch=chosen.micro_batch,
            predicted_peak_memory_bytes=self._peak(profile, job, chosen),
            memory_factor=self._corrections.factor(profile.device_class),
            runtime=_runtime(profile),
            recomputed_layers=job.trained[: chosen.recomputed],
            kernels=chosen.kernels,
            seconds_per_step=self._seconds(profile, job, chosen),
            bound=self._bound(profile, job, chosen),
        )

    def _bound(self, profile: Profile, job: _Job, chosen: _Candidate) -> str:
        """Each lever that stands lower than it could, and by how much the next setting misses."""
        reasons = []
        if chosen.recomputed:
            step = replace(chosen, recomputed=chosen.recomputed - 1)
            excess = self._excess(profile, job, step)
            reasons.append(
                f"recomputing {chosen.recomputed} of {len(job.trained)} layers "
                f"({step.recomputed} would need {excess})"
            )
        largest = next(self._micro_batches())
        if chosen.micro_batch < largest:
            wider = replace(chosen, micro_batch=min(2 * chosen.micro_batch, largest))
            if not self._is_allowed(profile, job, wider):
                excess = self._excess(profile, job, wider)
                reasons.append(
                    f"micro-batch {chosen.micro_batch} ({wider.micro_batch} would need {excess})"
                )
        reasons.extend(self._faster_base(profile, job, chosen))
        return "; ".join(reasons)

    def _faster_base(self, profile: Profile, job: _Job, chosen: _Candidate) -> Iterator[str]:
        """Why not the next faster precision."""
        own = self._seconds(profile, job, chosen)
        others = [
            replace(chosen, precision=precision, kernels="lean")
            for precision in self._allowed(profile)
            if precision != chosen.precision
        ]
        faster = [other for other in others if self._seconds(profile, job, other) < own]
        if not faster:
            return
        other = max(faster, key=lambda each: self._seconds(profile, job, each))
        if not self._is_allowed(profile, job, other):
            excess = self._excess(profile, job, other)
            yield f"{chosen.precision} base ({other.precision} would need {excess})"
        elif self._compiler.base_bytes(other.precision) > self._light_bytes(profile):
            share = f"{WEIGHTS_SHARE:.0%} of the limit"
            yield f"{chosen.precision} base (that of {other.precision} takes more than {share})"

    def _excess(self, profile: Profile, job: _Job, candidate: _Candidate) -> str:
        missing = self._peak(profile, job, candidate) - self._budget(profile)
        return f"{max(missing, 0) / MEGABYTE:.0f} MB more"

    def _by_preference(self, profile: Profile) -> Iterator[list[str]]:
        allowed = self._allowed(profile)
        light_bytes = self._light_bytes(profile)
        light = [p for p in allowed if self._compiler.base_bytes(p) <= light_bytes]
        yield light
        yield [p for p in allowed if p not in light]

    def _allowed(self, profile: Profile) -> Sequence[str]:
        """Precisions that a device may get, the best quality first."""
        return self._class_precisions.get(profile.device_class, self._precisions)

    def _light_bytes(self, profile: Profile) -> float:
        return profile.memory_limit_bytes * WEIGHTS_SHARE

    def _micro_batches(self) -> Iterator[int]:
        micro_batch = min(self._batch_size, max(1, -(-ENOUGH_TOKENS // self._max_length)))
        while micro_batch > 1:
            yield micro_batch
            micro_batch //= 2
        yield 1

    def _ranks(self) -> Iterator[int]:
        rank = 1
        while rank < self._max_rank:
            yield rank
            rank *= 2
        yield self._max_rank

    def _budget(self, profile: Profile) -> int:
        return int(profile.memory_limit_bytes * self._share(profile))

    def _share(self, profile: Profile) -> float:
        """Share of the limit that a plan may fill: more of it where the class was measured."""
        is_measured = self._corrections.is_measured(profile.device_class)
        return max(self._safety, MEASURED_SAFETY) if is_measured else self._safety

    def _is_allowed(self, profile: Profile, job: _Job, candidate: _Candidate) -> bool:
        return self._peak(profile, job, candidate) <= self._budget(profile)

    def _fits(self, profile: Profile, job: _Job) -> bool:
        """Whether the leanest plan of any precision fits."""
        by_size = sorted(self._allowed(profile), key=self._compiler.base_bytes)
        return any(self._is_allowed(profile, job, self._leanest(job, p)) for p in by_size)

    def _leanest(self, job: _Job, precision: str) -> _Candidate:
        return _Candidate(
            precision=precision, kernels="lean", micro_batch=1, recomputed=len(job.trained)
        )

    def _peak(
        self, profile: Profile, job: _Job, candidate: _Candidate, length: int | None = None
    ) -> int:
        """Predicted peak with the correction of the device's class; the app's share has none."""
        length = length or self._max_length
        key = (job, candidate, length)
        if key not in self._known:
            self._known[key] = self._compiler.predicted_peak_memory(
                precision=candidate.precision,
                lowest_trained_layer=job.lowest,
                kept_layers=job.kept,
                rank=job.rank,
                micro_batch=candidate.micro_batch,
                length=length,
                baseline_bytes=0,
                recomputed_layers=job.trained[: candidate.recomputed],
                kernels=candidate.kernels,
            )
        peak = profile.memory_baseline_bytes + self._known[key]
        return int(peak * self._corrections.factor(profile.device_class))

    def _seconds(self, profile: Profile, job: _Job, candidate: _Candidate) -> float:
        return step_seconds(
            self._compiler,
            precision=candidate.precision,
            kernels=candidate.kernels,
            lowest_trained_layer=job.lowest,
            kept_layers=job.kept,
            recomputed_layers=job.trained[: candidate.recomputed],
            batch_size=self._batch_size,
            micro_batch=candidate.micro_batch,
            length=self._max_length,
            speed_gflops=profile.speed_gflops,
        )

    def _refusal(self, profile: Profile, job: _Job) -> DoesNotFitError:
        peaks = {p: self._peak(profile, job, self._leanest(job, p)) for p in self._allowed(profile)}
        smallest = min(peaks, key=lambda precision: peaks[precision])
        need = peaks[smallest]
        limit = profile.memory_limit_bytes
        reason = (
            f"The smallest plan ({smallest}, rank {job.rank}, {len(job.kept)} layers, trained from "
            f"layer {job.lowest}, micro-batch 1 x {self._max_length} tokens) needs "
            f"{need / MEBIBYTE:.0f} MiB; the device allows {limit / MEBIBYTE:.0f} MiB."
        )
        remedy = f"Allow the app {need / self._share(profile) / MEBIBYTE:.0f} MiB"
        shorter = self._max_length // 2
        while shorter >= 8:
            peak = self._peak(profile, job, self._leanest(job, smallest), shorter)
            if peak <= self._budget(profile):
                remedy = f"Set max_length to {shorter}, or allow" + remedy.removeprefix("Allow")
                break
            shorter //= 2
        return DoesNotFitError(reason, remedy + ".")

    def _estimated_seconds(self, profile: Profile) -> float:
        """Of a step over all layers with the best base, as methods compare devices by it."""
        everything = tuple(range(self._compiler.layer_count))
        job = _Job(rank=self._max_rank, lowest=0, kept=everything)
        best = _Candidate(
            precision=self._allowed(profile)[0],
            kernels="lean",
            micro_batch=next(self._micro_batches()),
        )
        return self._seconds(profile, job, best)


def lowest_trained_layer(assignment: Assignment, layer_count: int) -> int:
    """Layer at which backward stops; ``layer_count`` when only the head trains."""
    return min(assignment.trained_layers, default=layer_count)


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
