# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: phases of training, then operations, then packs what to send.

The result depends on plan, package, adapter and data alone: a run that was killed and went on from
its journal ends with the same bits as one that was not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lorikit.proto.device import TrainingReport
from lorikit.proto.directions import SEED_SCALARS, replayed
from lorikit.proto.manifest import Manifest
from lorikit.proto.plan import Phase, Plan
from lorikit.proto.tensors import Bundle, Float32, Tensors
from lorikit.quantization.wire import compressed
from lorikit.sdk._data import Dataset, Indices
from lorikit.sdk._errors import (
    CancelledError,
    DataError,
    NonFiniteError,
    PlanRefusedError,
    StorageFullError,
)
from lorikit.sdk._events import Event, Progress
from lorikit.sdk._forward_only import drawn_directions, moves, slope
from lorikit.sdk._memory import memory_use
from lorikit.sdk._operations.base import GradientOperation, Result, Work
from lorikit.sdk._optimizer import (
    clip_by_global_norm,
    first_order_effects,
    initial_slots,
    mean_squared_gradients,
    scheduled_learning_rate,
    updated,
)
from lorikit.sdk._snapshot import Snapshot, fingerprint, from_journal, to_journal
from lorikit.sdk._store import Journal, Residuals
from lorikit.sdk._validation import CheckedPlan, adapter_rank, check_plan
from lorikit.sdk._wire import check_scheme, encode_with_feedback
from lorikit.sdk.engines._signature import DROPOUT_SEED
from lorikit.sdk.engines.base import Batch, Engine, Evaluation, Gradients

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished task yields."""

    bundle: Bundle
    """Tensors to send, in the plan's codec; scalars ``examples`` (size of the data set) and
    ``rank``."""
    report: TrainingReport
    """Numbers of the work; engine, download time and bytes are the client's to fill in."""


class PlanExecutor:
    """Carries out plans on one opened package and one data set."""

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        data: Dataset,
        *,
        journal: Journal,
        residuals: Residuals | None = None,
        emit: Callable[[Event], None],
        cancelled: Callable[[], bool],
        journal_interval_steps: int = 10,
        journal_interval_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wire the parts.

        Args:
            engine: The opened package.
            manifest: The same package's manifest.
            data: The local examples, cut at the plan's ``max_length``.
            journal: Where the state is kept; cleared by whoever knows that the update arrived.
            residuals: Where error feedback keeps what updates left out; None forgets it.
            emit: Takes a ``Progress`` event after each optimiser step.
            cancelled: Asked before each run of the graph.
            journal_interval_steps: Optimiser steps between two saves, at most.
            journal_interval_seconds: Seconds between two saves, at most by one step.
            clock: Seconds from any start.
        """
        self._engine = engine
        self._manifest = manifest
        self._data = data
        self._journal = journal
        self._residuals = residuals
        self._emit = emit
        self._cancelled = cancelled
        self._interval_steps = journal_interval_steps
        self._interval_seconds = journal_interval_seconds
        self._clock = clock

    def run(self, plan: Plan, adapter: Tensors, task_id: str) -> Outcome:
        """Carry out a plan from where its journal stands, or from its start.

        Args:
            plan: What to do; checked whole before the first step.
            adapter: The adapter as received, every tensor of the manifest.
            task_id: Name of the task in events and journal.

        Raises:
            PlanRefusedError: The plan needs something that is not here.
            PackageError: The adapter or a graph does not fit the package.
            DataError: There are no examples.
            NonFiniteError: A loss, a gradient or a tensor is not finite.
            CancelledError: The app wants to stop; the journal holds the last finished step.
        """
        checked = check_plan(plan, self._manifest, adapter)
        if plan.wire is not None:
            check_scheme(plan.wire)
        self._check_data(plan)
        task = _Task(checked, task_id, fingerprint(plan, adapter), adapter)
        snapshot = self._resumed(task) or Snapshot(adapter=dict(adapter))
        while snapshot.phase < len(plan.phases):
            self._train(task, snapshot)
        return self._finished(task, adapter, snapshot)

    def _check_data(self, plan: Plan) -> None:
        if not len(self._data):
            raise DataError("the device has no examples to train on")
        if self._data.max_length > plan.max_length:
            raise PlanRefusedError(
                f"examples were cut at {self._data.max_length} tokens, the plan allows "
                f"{plan.max_length}"
            )

    def _resumed(self, task: _Task) -> Snapshot | None:
        saved = self._journal.load(task.id)
        if saved is None:
            return None
        snapshot = from_journal(*saved, task.fingerprint)
        if snapshot is None:
            logger.warning("journal of another plan is dropped: task=%s", task.id)
        return snapshot

    def _save(self, task: _Task, snapshot: Snapshot) -> None:
        """Save the state where there is room; on a full disk a kill costs more steps, no work."""
        try:
            self._journal.save(task.id, *to_journal(snapshot, task.fingerprint))
        except StorageFullError as error:
            logger.warning("task goes on without a new journal (task=%s): %s", task.id, error)

    def _train(self, task: _Task, snapshot: Snapshot) -> None:
        """Run the snapshot's phase from its step to its end."""
        phase = task.plan.phases[snapshot.phase]
        schedule = _drawn(len(self._data), phase, task.plan.seed, snapshot.step)
        saved_step, saved_time = snapshot.step, self._clock()
        for chosen in schedule:
            started = self._clock()
            try:
                self._step(task, phase, snapshot, chosen)
            except CancelledError:
                self._save(task, snapshot)
                raise
            now = self._clock()
            snapshot.seconds += now - started
            self._report_progress(task, phase, snapshot)
            due = snapshot.step - saved_step >= self._interval_steps
            if due or now - saved_time >= self._interval_seconds:
                self._save(task, snapshot)
                saved_step, saved_time = snapshot.step, now
        snapshot.importance.update(_importance(task, snapshot))
        snapshot.phase, snapshot.step, snapshot.slots = snapshot.phase + 1, 0, {}
        self._save(task, snapshot)

    def _step(self, task: _Task, phase: Phase, snapshot: Snapshot, chosen: Indices) -> None:
        """One optimiser step; the snapshot changes only when all of it is done."""
        is_forward_only = phase.optimizer.name == "mezo"
        move = self._moved_forward_only if is_forward_only else self._moved_by_gradient
        result = move(task, phase, snapshot, chosen)
        if not snapshot.examples:
            snapshot.first_loss = result.loss
        snapshot.last_loss = result.loss
        snapshot.correct += result.correct
        snapshot.examples += len(chosen)
        snapshot.labels += int(self._data.counted(chosen).sum())
        snapshot.step += 1

    def _moved_by_gradient(
        self, task: _Task, phase: Phase, snapshot: Snapshot, chosen: Indices
    ) -> Evaluation:
        """Move the adapter against the gradient of the chosen examples' mean loss."""
        result = self._accumulated(task, phase, snapshot.adapter, snapshot.step, chosen)
        gradients = dict(result.gradients)
        operations = task.checked.gradient_operations[snapshot.phase]
        _add_terms(gradients, operations, snapshot.adapter, task.checked)
        gradients, _ = clip_by_global_norm(gradients, phase.optimizer.clip_norm)
        rate = scheduled_learning_rate(phase.optimizer, snapshot.step, phase.steps)
        for name, gradient in gradients.items():
            slots = snapshot.slots.get(name)
            if slots is None:
                slots = initial_slots(phase.optimizer, snapshot.adapter[name])
            factor = phase.learning_rate_factors.get(task.checked.roles[name], 1.0)
            snapshot.adapter[name], snapshot.slots[name] = updated(
                snapshot.adapter[name],
                gradient,
                slots,
                phase.optimizer,
                learning_rate=rate * factor,
                step=snapshot.step,
            )
            _check_finite(name, snapshot.adapter[name], "after the optimiser step")
        return Evaluation(loss=result.loss, correct=result.correct)

    def _moved_forward_only(
        self, task: _Task, phase: Phase, snapshot: Snapshot, chosen: Indices
    ) -> Evaluation:
        """Move the adapter along random directions, by the slope of the loss along each."""
        numbers = drawn_directions(phase, snapshot.step)
        found = [
            slope(
                lambda adapter: self._summed(task, phase, adapter, snapshot, chosen),
                snapshot.adapter,
                phase,
                number,
            )
            for number in numbers
        ]
        rate = scheduled_learning_rate(phase.optimizer, snapshot.step, phase.steps)
        steps = moves([(n, each) for n, (each, _) in zip(numbers, found, strict=True)], rate)
        factors = {
            name: phase.learning_rate_factors.get(task.checked.roles[name], 1.0)
            for name in phase.train
        }
        after = replayed(
            {name: snapshot.adapter[name] for name in phase.train},
            steps,
            phase_seed=phase.seed,
            factors=factors,
        )
        for name, value in after.items():
            _check_finite(name, value, "after the optimiser step")
        snapshot.adapter.update(after)
        earlier = snapshot.produced.get(SEED_SCALARS, np.zeros((0, 2), np.float32))
        snapshot.produced[SEED_SCALARS] = np.concatenate([earlier, np.array(steps, np.float32)])
        return Evaluation(
            loss=sum(each.loss for _, each in found) / len(found),
            correct=sum(each.correct for _, each in found) / len(found),
        )

    def _summed(
        self, task: _Task, phase: Phase, adapter: Tensors, snapshot: Snapshot, chosen: Indices
    ) -> Evaluation:
        """Mean loss over the chosen labels without gradients, gradient operations' terms added."""
        loss, correct = 0.0, 0.0
        for batch, inputs in self._micro_batches(task, phase, snapshot.step, chosen):
            part = self._engine.loss(adapter, batch, inputs)
            _check_finite("the loss", np.float32(part.loss), "of a micro-batch")
            loss += part.loss
            correct += part.correct
        for operation in task.checked.gradient_operations[snapshot.phase]:
            loss += operation.term(adapter, task.checked.pairs)[0]
        return Evaluation(loss=loss, correct=correct)

    def _micro_batches(
        self, task: _Task, phase: Phase, step: int, chosen: Indices
    ) -> Iterator[tuple[Batch, Mapping[str, float]]]:
        """The batches of one step with what else their run needs; weights sum to 1 over all."""
        weight = 1 / self._data.counted(chosen).sum()
        seed = (task.plan.seed, phase.seed)
        for index, group in enumerate(self._data.grouped(chosen, phase.micro_batch)):
            self._check_cancelled()
            dropout = np.random.SeedSequence([*seed, step, index]).generate_state(1)
            inputs = {**task.plan.inputs, DROPOUT_SEED: int(dropout[0])}
            yield self._data.batch(group, weight, seed=seed), inputs

    def _accumulated(
        self, task: _Task, phase: Phase, adapter: Tensors, step: int, chosen: Indices
    ) -> Gradients:
        """Mean loss over the chosen labels and its gradient, micro-batch by micro-batch."""
        loss, correct = 0.0, 0.0
        total: Tensors = {}
        for batch, inputs in self._micro_batches(task, phase, step, chosen):
            part = self._engine.gradients(adapter, batch, inputs)
            _check_finite("the loss", np.float32(part.loss), "of a micro-batch")
            loss += part.loss
            correct += part.correct
            for name in phase.train:
                gradient = part.gradients[name]
                _check_finite(name, gradient, "(its gradient)")
                total[name] = total[name] + gradient if name in total else gradient
        return Gradients(loss=loss, correct=correct, gradients=total)

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise CancelledError("the app cancelled the work")

    def _report_progress(self, task: _Task, phase: Phase, snapshot: Snapshot) -> None:
        earlier = sum(p.steps for p in task.plan.phases[: snapshot.phase])
        self._emit(
            Progress(
                task_id=task.id,
                phase=phase.name,
                step=earlier + snapshot.step,
                steps=task.checked.steps,
                loss=snapshot.last_loss,
            )
        )

    def _finished(self, task: _Task, received: Tensors, snapshot: Snapshot) -> Outcome:
        result = self._operated(task, received, snapshot.adapter)
        tensors = {**result.adapter, **snapshot.produced, **result.produced}
        rank = adapter_rank(result.adapter, task.checked.pairs)
        scalars = {"examples": float(len(self._data)), "rank": float(rank)}
        sent = {name: tensors[name] for name in _sent(task.plan, result)}
        bundle = self._encoded(task, received, snapshot, sent, scalars)
        return Outcome(bundle, self._training_report(task, snapshot, rank))

    def _encoded(
        self,
        task: _Task,
        received: Tensors,
        snapshot: Snapshot,
        sent: Tensors,
        scalars: Mapping[str, float],
    ) -> Bundle:
        """What is sent: adapter tensors by the plan's wire scheme, all others in its codec."""
        rng = np.random.default_rng([task.plan.seed, len(task.plan.phases)])
        scheme = task.plan.wire
        moved = {} if scheme is None else {n: v for n, v in sent.items() if n in received}
        tensors = {
            name: task.checked.codec.encode(values, rng=rng)
            for name, values in sent.items()
            if name not in moved
        }
        if scheme is None or not moved:
            return Bundle(tensors, scalars)
        update = encode_with_feedback(
            moved,
            received,
            scheme,
            self._residuals,
            seed=task.plan.seed,
            importance=scheme.sensitivity or snapshot.importance,
            precision=self._manifest.precision,
        )
        bundle = Bundle({**tensors, **update.tensors}, scalars, update.header)
        return compressed(bundle) if scheme.compressed else bundle

    def _operated(self, task: _Task, received: Tensors, adapter: Tensors) -> Result:
        produced: Tensors = {}
        for operation in task.checked.operations:
            result = operation.run(
                Work(
                    received=received,
                    adapter=adapter,
                    pairs=task.checked.pairs,
                    engine=self._engine,
                    data=self._data,
                    classes=len(self._manifest.task.labels),
                    inputs=task.plan.inputs,
                    seed=task.plan.seed,
                    check_cancelled=self._check_cancelled,
                )
            )
            adapter = result.adapter
            produced.update(result.produced)
        return Result(adapter=adapter, produced=produced)

    def _training_report(self, task: _Task, snapshot: Snapshot, rank: int) -> TrainingReport:
        memory = memory_use()
        return TrainingReport(
            examples=snapshot.examples,
            dataset_size=len(self._data),
            first_loss=snapshot.first_loss,
            last_loss=snapshot.last_loss,
            accuracy=snapshot.correct / snapshot.labels if snapshot.labels else 0.0,
            training_seconds=snapshot.seconds,
            peak_memory_bytes=memory.peak_resident_bytes,
            anonymous_memory_bytes=memory.anonymous_bytes,
            steps=task.checked.steps,
            rank=rank,
        )


@dataclass(frozen=True, slots=True)
class _Task:
    """One call of ``run``."""

    checked: CheckedPlan
    id: str
    fingerprint: str
    received: Tensors

    @property
    def plan(self) -> Plan:
        return self.checked.plan


def _drawn(examples: int, phase: Phase, plan_seed: int, first_step: int) -> Iterator[Indices]:
    """The draws of each step of a phase from ``first_step`` on; see ``Dataset``.

    Epoch after epoch in a fresh order, one long stream cut into steps; a data set smaller than
    the batch is used whole in each step. The order of an epoch depends on (plan seed, phase seed,
    epoch) alone.
    """
    size = min(phase.batch_size, examples)
    epoch, order = -1, np.arange(0)
    for step in range(first_step, phase.steps):
        chosen = np.arange(step * size, (step + 1) * size)
        parts = []
        for wanted in np.unique(chosen // examples):
            if wanted != epoch:
                epoch = int(wanted)
                rng = np.random.default_rng([plan_seed, phase.seed, epoch])
                order = rng.permutation(examples)
            drawn = order[chosen[chosen // examples == wanted] % examples]
            parts.append(drawn + epoch * examples)
        yield np.concatenate(parts)


def _importance(task: _Task, snapshot: Snapshot) -> dict[str, float]:
    """Weight of each tensor that the phase trained, as the plan's wire scheme reckons it."""
    wire = task.plan.wire
    if wire is not None and wire.importance == "first-order":
        return first_order_effects(snapshot.slots, task.received, snapshot.adapter)
    return mean_squared_gradients(snapshot.slots)


def _add_terms(
    gradients: Tensors,
    operations: tuple[GradientOperation, ...],
    adapter: Tensors,
    checked: CheckedPlan,
) -> None:
    """Add the gradient of each operation's term to the tensors that train."""
    for operation in operations:
        _, terms = operation.term(adapter, checked.pairs)
        for name, term in terms.items():
            if name in gradients:
                gradients[name] = gradients[name] + term


def _sent(plan: Plan, result: Result) -> tuple[str, ...]:
    """Names to send: the plan's list, or else all that was trained and all that was produced."""
    if plan.send:
        return plan.send
    trained = dict.fromkeys(name for phase in plan.phases for name in phase.train)
    return (*trained, *result.produced)


def _check_finite(name: str, values: Float32 | np.float32, where: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{name} is not finite {where}; lower the learning rate or clip")
