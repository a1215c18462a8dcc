# SPDX-License-Identifier: Apache-2.0
"""From what a device can do to what it is asked to do, or a refusal that says what would help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lorikit.proto.device import Profile
from lorikit.server.errors import LorikitError
from lorikit.server.methods.base import Assignment, Participant

MEBIBYTE = 1 << 20

ENOUGH_TOKENS = 256
"""Tokens in a micro-batch beyond which a larger one is no faster on a CPU; measured on two
cores."""

WEIGHTS_SHARE = 0.08
"""Share of a device's budget that the mapped base may take while a smaller format fits."""

EFFICIENCY = 0.5
"""Share of the measured matrix-product speed that a training step reaches."""

DEFAULT_GFLOPS = 20.0
"""Speed assumed of a device that reports none, GFLOP/s."""


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
    runtime: str
    recomputed_layers: tuple[int, ...] = ()
    """Layers whose forward values are made again for the backward pass."""
    kernels: str = "lean"
    """``lean`` or ``fast``; see ``compile.Variant``."""


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
    ) -> int:
        """Predicted peak resident bytes of a device process."""
        ...

    def base_bytes(self, precision: str) -> int:
        """Bytes of the whole base at a precision."""
        ...

    def flops_per_token(self, lowest_trained_layer: int, kept_layers: Sequence[int]) -> int:
        """Floating-point operations of a training step per token."""
        ...


class Planner:
    """Turns profiles into limits for methods, and assignments into precision and micro-batch."""

    def __init__(
        self,
        compiler: MemoryModel,
        *,
        precisions: Sequence[str] = ("fp32", "fp16", "int8", "nf4"),
        batch_size: int,
        max_length: int,
        max_rank: int,
        safety: float = 0.95,
    ) -> None:
        """Args.

        Args:
            compiler: Knows the memory of every variant.
            precisions: Allowed precisions of the base, the best quality first.
            batch_size: Examples per optimiser step.
            max_length: Tokens of the longest example.
            max_rank: Rank of the global adapter.
            safety: Share of a device's memory limit that a plan may fill.
        """
        self._compiler = compiler
        self._precisions = tuple(precisions)
        self._batch_size = batch_size
        self._max_length = max_length
        self._max_rank = max_rank
        self._safety = safety

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
        depths = [d for d in range(1, layers + 1) if self._fits(profile, 1, layers - d, everything)]
        counts = [n for n in range(1, layers + 1) if self._fits(profile, 1, 0, everything[-n:])]
        if not depths and not counts:
            raise self._refusal(profile, 1, layers - 1, everything)
        max_depth = max(depths, default=0)
        max_rank = max(
            (r for r in self._ranks() if self._fits(profile, r, layers - max_depth, everything)),
            default=1,
        )
        return Participant(
            device_id=device_id,
            device_class=profile.device_class,
            memory_limit_bytes=profile.memory_limit_bytes,
            max_rank=max_rank,
            max_depth=max_depth,
            max_layers=max(counts, default=0),
            seconds_per_step=seconds_per_step or self._estimated_seconds(profile),
            local=local,
        )

    def choose(self, profile: Profile, assignment: Assignment) -> Choice:
        """Precision and micro-batch for an assignment.

        The best precision whose base takes at most ``WEIGHTS_SHARE`` of the budget wins; where none
        does, the smallest that fits. The micro-batch is the largest that fits, up to
        ``ENOUGH_TOKENS``.

        Raises:
            DoesNotFitError: The assignment fits in no precision.
        """
        rank = max(assignment.ranks.values(), default=1)
        lowest = lowest_trained_layer(assignment, self._compiler.layer_count)
        for precision in self._by_preference(profile):
            for micro_batch in self._micro_batches():
                peak = self._peak(
                    profile, precision, rank, lowest, assignment.kept_layers, micro_batch
                )
                if peak <= self._budget(profile):
                    return Choice(
                        precision=precision,
                        micro_batch=micro_batch,
                        predicted_peak_memory_bytes=peak,
                        runtime=_runtime(profile),
                    )
        raise self._refusal(profile, rank, lowest, assignment.kept_layers)

    def _by_preference(self, profile: Profile) -> list[str]:
        allowed = profile.memory_limit_bytes * WEIGHTS_SHARE
        size = self._compiler.base_bytes
        light = [p for p in self._precisions if size(p) <= allowed]
        heavy = sorted((p for p in self._precisions if p not in light), key=size)
        return [*light, *heavy]

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
        return int(profile.memory_limit_bytes * self._safety)

    def _fits(self, profile: Profile, rank: int, lowest: int, kept: Sequence[int]) -> bool:
        budget = self._budget(profile)
        return any(
            self._peak(profile, precision, rank, lowest, kept, 1) <= budget
            for precision in self._precisions
        )

    def _peak(
        self,
        profile: Profile,
        precision: str,
        rank: int,
        lowest: int,
        kept: Sequence[int],
        micro_batch: int,
    ) -> int:
        return self._compiler.predicted_peak_memory(
            precision=precision,
            lowest_trained_layer=lowest,
            kept_layers=tuple(kept),
            rank=rank,
            micro_batch=micro_batch,
            length=self._max_length,
            baseline_bytes=profile.memory_baseline_bytes,
        )

    def _refusal(
        self, profile: Profile, rank: int, lowest: int, kept: Sequence[int]
    ) -> DoesNotFitError:
        peaks = {p: self._peak(profile, p, rank, lowest, kept, 1) for p in self._precisions}
        smallest = min(peaks, key=lambda precision: peaks[precision])
        need = peaks[smallest]
        limit = profile.memory_limit_bytes
        reason = (
            f"The smallest plan ({smallest}, rank {rank}, {len(kept)} layers, trained from layer "
            f"{lowest}, micro-batch 1 x {self._max_length} tokens) needs "
            f"{need / MEBIBYTE:.0f} MiB; the device allows {limit / MEBIBYTE:.0f} MiB."
        )
        remedy = f"Allow the app {need / self._safety / MEBIBYTE:.0f} MiB"
        shorter = self._max_length // 2
        while shorter >= 8:
            peak = self._compiler.predicted_peak_memory(
                precision=smallest,
                lowest_trained_layer=lowest,
                kept_layers=tuple(kept),
                rank=rank,
                micro_batch=1,
                length=shorter,
                baseline_bytes=profile.memory_baseline_bytes,
            )
            if peak <= self._budget(profile):
                remedy = f"Set max_length to {shorter}, or allow" + remedy.removeprefix("Allow")
                break
            shorter //= 2
        return DoesNotFitError(reason, remedy + ".")

    def _estimated_seconds(self, profile: Profile) -> float:
        speed = (profile.speed_gflops or DEFAULT_GFLOPS) * 1e9 * EFFICIENCY
        layers = tuple(range(self._compiler.layer_count))
        flops = self._compiler.flops_per_token(0, layers) * self._batch_size * self._max_length
        return flops / speed


def lowest_trained_layer(assignment: Assignment, layer_count: int) -> int:
    """Layer at which backward stops; ``layer_count`` when only the head trains."""
    return min(assignment.trained_layers, default=layer_count)


def _runtime(profile: Profile) -> str:
    """Runtime whose graphs the device's preferred engine runs."""
    preferred = profile.engines[0].name if profile.engines else "onnx"
    return "onnx-training" if preferred == "onnx-training" else "onnx"
