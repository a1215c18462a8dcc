# SPDX-License-Identifier: Apache-2.0
"""The work of each state of a round, as plain blocking calls.

Every call may be repeated: it reads the store and the blobs, and what it writes has the same name
and content each time. So a server that was killed anywhere starts the state's work again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from lorikit.proto.device import EngineInfo, Profile
from lorikit.proto.manifest import BlobRef, Manifest
from lorikit.proto.plan import PLAN_VERSION, Plan
from lorikit.proto.tensors import Tensors
from lorikit.proto.wire import plan_to_message
from lorikit.quantization.wire import small_codec
from lorikit.server.config import EvaluationData, RunConfig
from lorikit.server.downlink import (
    Downlink,
    Version,
    as_from_exact,
    change_to_json,
    shared_bases,
)
from lorikit.server.errors import LorikitError
from lorikit.server.evaluation import accuracy_and_loss, evaluation_rows
from lorikit.server.learning import Observation
from lorikit.server.methods.base import (
    AdapterSpace,
    Assignment,
    Contribution,
    Method,
    Participant,
    State,
)
from lorikit.server.methods.corrected import drift_of
from lorikit.server.methods.state import pack_state, unpack_state
from lorikit.server.planner.choice import DoesNotFitError
from lorikit.server.plans import (
    Choice,
    assignment_from_json,
    assignment_to_json,
    build_plan,
    expected_from_json,
    expected_to_json,
    expected_update,
    identifier,
    largest_update_bytes,
    seed_of,
)
from lorikit.server.refusals import check_operations, instead
from lorikit.server.report_drift import write_drift
from lorikit.server.sensitivity import sensitivities
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import DeviceRow, RoundRow, TaskRow, UpdateRow
from lorikit.server.updates import read_adapter, read_update, with_received

if TYPE_CHECKING:
    from lorikit.server.compile.tokens import TokenLosses

logger = logging.getLogger(__name__)


class Package(Protocol):
    """A published package; see ``compile.Package``."""

    @property
    def manifest(self) -> Manifest:
        """What is in it."""
        ...

    @property
    def ref(self) -> BlobRef:
        """Blob of the manifest."""
        ...


class PackageSource(Protocol):
    """Where packages come from; see ``compile.Compiler``."""

    @property
    def layer_count(self) -> int:
        """Layers of the base model."""
        ...

    def space(self, max_rank: int) -> AdapterSpace:
        """The adapter tensors of the base model."""
        ...

    def initial(self, max_rank: int, seed: int) -> Tensors:
        """Start values of the adapter."""
        ...

    def package(
        self,
        *,
        precision: str,
        lowest_trained_layer: int,
        kept_layers: Sequence[int] | None = None,
        runtime: str = "onnx",
        recomputed_layers: Sequence[int] = (),
        kernels: str = "lean",
    ) -> Package:
        """A verified, published package."""
        ...

    def logits(
        self,
        adapter: Tensors,
        texts: Sequence[str],
        *,
        lora_scale: float,
        max_length: int,
    ) -> npt.NDArray[np.float32]:
        """Class scores, [texts, classes]."""
        ...

    def token_losses(
        self,
        adapter: Tensors,
        texts: Sequence[str],
        *,
        lora_scale: float,
        max_length: int,
    ) -> TokenLosses:
        """How well a language model foresees texts."""
        ...


class DevicePlanner(Protocol):
    """Who fits what; see ``planner.Planner``. Both calls raise ``DoesNotFitError``."""

    def participant(
        self,
        device_id: str,
        profile: Profile,
        local: Mapping[str, float],
        seconds_per_step: float | None = None,
    ) -> Participant:
        """The device as methods see it."""
        ...

    def choose(self, profile: Profile, assignment: Assignment) -> Choice:
        """Precision, micro-batch and runtime for an assignment."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """What a run is made of, opened from its settings."""

    method: Method
    source: PackageSource
    planner: DevicePlanner
    export: Callable[[Path, Tensors, int], None]
    """Writes an adapter of that rank as a PEFT folder."""
    evaluation: EvaluationData | None = None
    teach: Callable[[Iterable[Observation]], None] = lambda _: None
    """Hears at the end of a run what its devices measured."""


_REMEMBERED_ROUNDS = 34
"""Rounds looked back for a device's last update. Its error feedback forgets sooner; a device that
missed more gets its adapter whole."""

_SENSITIVITY_ROWS = 64
"""Rows that the sensitivity of a tensor is measured on."""

_Facts = tuple[str, Mapping[str, float], float | None]
"""What a participant follows from: profile, the method's memory, measured speed."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a method gives a device, and how the planner has it done."""

    assignment: Assignment
    profile: Profile
    choice: Choice


class RoundWork:
    """The blocking work of one run."""

    def __init__(
        self,
        run_id: str,
        config: RunConfig,
        parts: RunParts,
        *,
        store: SqlStore,
        blobs: FolderBlobs,
        private: FolderBlobs,
        folder: Path,
    ) -> None:
        """Bind the parts of a run.

        Args:
            run_id: The run.
            config: Its settings.
            parts: Its method, compiler and planner.
            store: Where rounds and tasks are.
            blobs: What devices may download.
            private: States and updates; never served.
            folder: Where exported adapters go.
        """
        self.config = config
        self.parts = parts
        self.folder = folder
        self._run_id = run_id
        self._store = store
        self._blobs = blobs
        self._private = private
        self._downlink = Downlink(config, blobs)
        self._sensitivities: dict[int, dict[str, float]] = {}
        self._space = parts.source.space(config.max_rank)
        self._participants: dict[str, tuple[_Facts, Participant]] = {}

    def first_state(self) -> str:
        """Digest of the method's state before the first round, stored."""
        seed = seed_of("initial", self.config.seed)
        initial = self.parts.source.initial(self.config.max_rank, seed)
        state = self.parts.method.start(self._space, initial)
        return self._private.put(pack_state(state)).digest

    def state_before(self, number: int) -> State:
        """The method's state before round ``number``."""
        if number == 0:
            return self._read_state(self._store.run(self._run_id).initial_digest)
        return self._read_state(self._store.round(self._run_id, number - 1).state_digest)

    def consider(
        self, state: State, device_ids: Iterable[str]
    ) -> tuple[list[Participant], list[str]]:
        """The devices among those given that fit, and those that are refused now, by device id."""
        wanted = set(device_ids)
        fitting, refused = [], []
        for member, device in self._store.members(self._run_id):
            if device.id not in wanted or member.refused_reason is not None:
                continue
            local = dict(state.devices.get(device.id, {}))
            try:
                fitting.append(self._participant(device.id, device.profile, local))
            except DoesNotFitError as error:
                self._refuse(device.id, error)
                refused.append(device.id)
        return fitting, refused

    def assign(self, row: RoundRow, participants: Sequence[Participant]) -> list[TaskRow]:
        """Choose the cohort and make its tasks, packages and adapters; nothing is stored but blobs.

        A device for which the method's assignment does not fit is refused and left out.
        """
        state = self.state_before(row.number)
        cohort = self._cohort(row, participants)
        rng = np.random.default_rng(seed_of("assign", self.config.seed, row.number, row.attempt))
        planned = []
        for assignment in self.parts.method.assign(state, self._space, row.number, cohort, rng):
            try:
                planned.append(self._planned(assignment))
            except DoesNotFitError as error:
                self._turn_down(cohort, assignment, error)
        assignments = [each.assignment for each in planned]
        counted = {a.device_id: self._counted(row.number, a.device_id) for a in assignments}
        held = {device: None if last is None else last[1] for device, last in counted.items()}
        bases = shared_bases(assignments, held)
        tasks = []
        for each in planned:
            device_id = each.assignment.device_id
            last = counted[device_id]
            version = self._version(state, each.assignment, bases[device_id], row.number)
            try:
                tasks.append(self._task(row, each, version, None if last is None else last[0]))
            except DoesNotFitError as error:
                self._turn_down(cohort, each.assignment, error)
        return tasks

    def aggregate(self, number: int) -> str:
        """Digest of the method's state after the round, stored.

        Updates are read in the order of device ids, one at a time; the result depends on nothing
        but them, the state before, and the settings.
        """
        state = self.state_before(number)
        contributions = self._contributions(state, self._store.updates(self._run_id, number))
        after = self.parts.method.aggregate(state, self._space, contributions)
        return self._private.put(pack_state(after)).digest

    def evaluation_tasks(self, number: int) -> list[TaskRow]:
        """One task per device that sent an update: measure the new adapter on its own data."""
        state = self.state_before(number + 1)
        done = {update.task_id for update in self._store.updates(self._run_id, number)}
        tasks = []
        for task in self._store.tasks(self._run_id, number):
            if task.id not in done:
                continue
            assignment = assignment_from_json(task.assignment)
            version = self._version(state, assignment, task.adapter_digest, number + 1)
            name = identifier("evaluate", task.id)
            tasks.append(
                TaskRow(
                    id=name,
                    update_id=name,
                    run_id=task.run_id,
                    round=task.round,
                    attempt=task.attempt,
                    device_id=task.device_id,
                    kind="evaluate",
                    plan=task.plan,
                    package_digest=task.package_digest,
                    package_size=task.package_size,
                    adapter_digest=version.adapter.digest,
                    adapter_size=version.adapter.size,
                    change=change_to_json(version.change),
                    assignment=task.assignment,
                    expected="{}",
                    max_update_bytes=0,
                    facts=task.facts,
                )
            )
        return tasks

    def export(self, number: int) -> None:
        """Write the adapter after the round as one PEFT folder per rank in use."""
        state = self.state_before(number + 1)
        ranks = self._ranks(self._store.tasks(self._run_id, number))
        self._export(state, self.folder / "adapters" / f"round-{number:04d}", ranks)
        if drift := drift_of(state):
            write_drift(self.folder, number, drift)

    def export_final(self, rounds: int) -> None:
        """Write the adapter after the last round, for every rank that any device has."""
        ranks = self._ranks(self._last_tasks().values())
        self._export(self.state_before(rounds), self.folder / "adapter", ranks)
        self.parts.teach(self._observations(rounds))

    def is_measured(self, number: int, *, is_last: bool) -> bool:
        """Whether the server evaluates after that round."""
        due = (number + 1) % self.config.evaluate_every == 0
        return self.parts.evaluation is not None and (due or is_last)

    def evaluate(self, number: int) -> tuple[dict[str, float], int]:
        """Accuracy and mean loss of the adapter after the round, and the number of rows."""
        if self.parts.evaluation is None:
            raise LorikitError("run has no evaluation_data")
        texts, labels = evaluation_rows(self.parts.evaluation, self.config)
        adapter = self.parts.method.global_adapter(self.state_before(number + 1), self._space)
        return self._measured(adapter, texts, labels), len(texts)

    def _measured(
        self, adapter: Tensors, texts: Sequence[str], labels: Sequence[int]
    ) -> dict[str, float]:
        """What the server measures of an adapter on some rows."""
        source, scale, length = self.parts.source, self.config.lora_scale, self.config.max_length
        if self.config.task_kind == "causal-language-modeling":
            losses = source.token_losses(adapter, texts, lora_scale=scale, max_length=length)
            return losses.metrics()
        logits = source.logits(adapter, texts, lora_scale=scale, max_length=length)
        return accuracy_and_loss(logits, labels)

    def _sensitivity(self, number: int) -> Mapping[str, float]:
        """Weights of errors in the round's updates; empty where the run does not ask for them.

        They belong to the state of the last round that was due, so that a restarted server finds
        the same.
        """
        evaluation = self.parts.evaluation
        if self.config.codec_options.get("importance") != "server" or evaluation is None:
            return {}
        due = number - number % self.config.sensitivity_every
        if due not in self._sensitivities:
            adapter = self.parts.method.global_adapter(self.state_before(due), self._space)
            rows = evaluation_rows(evaluation, self.config, most=_SENSITIVITY_ROWS)
            names = [name for name, values in adapter.items() if small_codec(values) is None]
            found = sensitivities(lambda a: self._measured(a, *rows)["loss"], adapter, names)
            self._sensitivities = {due: found}
        return self._sensitivities[due]

    def hand_out(self, rounds: int) -> None:
        """Give every member its part of the final adapter and a package to use it with."""
        state = self.state_before(rounds)
        last = self._last_tasks()
        for member, device in self._store.members(self._run_id):
            if member.refused_reason is not None:
                continue
            try:
                assignment, package = self._final(state, rounds, device, last)
            except LorikitError as error:  # the run has its result; one device goes without
                logger.warning("no final adapter for device=%s: %s", device.id, error)
                continue
            adapter = self._version(state, assignment, None, rounds).adapter
            self._store.set_result(
                self._run_id,
                device.id,
                package=package,
                adapter=(adapter.digest, adapter.size),
                inputs={"lora_scale": assignment.scale},
                max_length=self.config.max_length,
            )

    def forget_updates(self, number: int) -> None:
        """Remove the updates of a closed round."""
        needed = self._store.referenced_digests()
        for update in self._store.updates(self._run_id, number):
            if update.digest not in needed:
                self._private.remove(update.digest)

    def _read_state(self, digest: str | None) -> State:
        if digest is None:
            raise LorikitError(f"run {self._run_id} has no state to go on from")
        return unpack_state(self._private.read_whole(digest))

    def _participant(self, device_id: str, profile: str, local: Mapping[str, float]) -> Participant:
        """The device as methods see it; reckoned anew only where something has changed."""
        seconds = self._measured_speed(device_id) if self.config.use_measured_speed else None
        facts = (profile, local, seconds)
        known = self._participants.get(device_id)
        if known is None or known[0] != facts:
            reckoned = self._reckoned(device_id, profile_from_json(profile), local, seconds)
            known = self._participants[device_id] = (facts, reckoned)
        return known[1]

    def _reckoned(
        self, device_id: str, profile: Profile, local: Mapping[str, float], seconds: float | None
    ) -> Participant:
        if profile.plan_version < PLAN_VERSION:
            raise DoesNotFitError(
                f"The SDK reads plans up to version {profile.plan_version}, this server writes "
                f"version {PLAN_VERSION}.",
                "Update the SDK in the app.",
            )
        return self.parts.planner.participant(device_id, profile, local, seconds)

    def _measured_speed(self, device_id: str) -> float | None:
        """Mean seconds per optimiser step at full depth over the device's updates; None at first.

        A step whose backward pass went through k of L layers took 1/3 + 2/3 k/L of a full one.
        """
        seconds = []
        depths = {
            task.id: len(json.loads(task.facts)["trained_layers"])
            for task in self._store.tasks(self._run_id)
        }
        for number in range(len(self._store.rounds(self._run_id))):
            for update in self._store.updates(self._run_id, number):
                report = json.loads(update.report)
                if update.device_id == device_id and report["steps"]:
                    depth = depths[update.task_id] / self._space.layer_count
                    step = report["training_seconds"] / report["steps"]
                    seconds.append(step / (1 / 3 + 2 / 3 * depth))
        return sum(seconds) / len(seconds) if seconds else None

    def _turn_down(
        self, cohort: Sequence[Participant], assignment: Assignment, error: DoesNotFitError
    ) -> None:
        """Refuse a device that the method has work for."""
        device = next(d for d in cohort if d.device_id == assignment.device_id)
        self._refuse(device.device_id, instead(error, self.config.method, device, assignment))

    def _refuse(self, device_id: str, error: DoesNotFitError) -> None:
        self._store.refuse(self._run_id, device_id, reason=error.reason, remedy=error.remedy)

    def _cohort(self, row: RoundRow, participants: Sequence[Participant]) -> list[Participant]:
        """The devices that get work, by device id."""
        fraction = math.ceil(self.config.cohort_fraction * len(participants))
        size = min(len(participants), max(fraction, self.config.needed_updates))
        rng = np.random.default_rng(seed_of("cohort", self.config.seed, row.number, row.attempt))
        chosen = rng.choice(len(participants), size=size, replace=False)
        return [participants[index] for index in sorted(chosen)]

    def _planned(self, assignment: Assignment) -> _Planned:
        """An assignment with what the planner chose for it; raises ``DoesNotFitError``."""
        device = self._store.device(assignment.device_id)
        if device is None:
            raise LorikitError(f"method assigned work to unknown device {assignment.device_id}")
        profile = profile_from_json(device.profile)
        choice = self.parts.planner.choose(profile, assignment)
        return _Planned(replace(assignment, precision=choice.precision), profile, choice)

    def _task(
        self, row: RoundRow, planned: _Planned, version: Version, counted_round: int | None
    ) -> TaskRow:
        assignment, choice = planned.assignment, planned.choice
        package = self._package(assignment, choice)
        plan = build_plan(
            self.config,
            assignment,
            choice,
            package.manifest.adapter,
            planned.profile,
            round_number=row.number,
            counted_round=counted_round,
            sensitivity=self._sensitivity(row.number),
        )
        check_operations(plan, planned.profile)
        expected = expected_update(
            plan, assignment, package.manifest.adapter, classes=len(self.config.labels)
        )
        name = identifier(self._run_id, row.number, row.attempt, assignment.device_id)
        return TaskRow(
            id=name,
            update_id=identifier("update", name),
            run_id=self._run_id,
            round=row.number,
            attempt=row.attempt,
            device_id=assignment.device_id,
            kind="train",
            plan=plan_to_message(plan).SerializeToString(deterministic=True),
            package_digest=package.ref.digest,
            package_size=package.ref.size,
            adapter_digest=version.adapter.digest,
            adapter_size=version.adapter.size,
            change=change_to_json(version.change),
            assignment=assignment_to_json(assignment),
            expected=expected_to_json(expected),
            max_update_bytes=largest_update_bytes(expected),
            facts=_facts(plan, choice),
        )

    def _package(self, assignment: Assignment, choice: Choice) -> Package:
        every_layer = tuple(range(self.parts.source.layer_count))
        lowest = min(assignment.trained_layers, default=self.parts.source.layer_count)
        return self.parts.source.package(
            precision=choice.precision,
            lowest_trained_layer=lowest,
            kept_layers=None if assignment.kept_layers == every_layer else assignment.kept_layers,
            runtime=choice.runtime,
            recomputed_layers=choice.recomputed_layers,
            kernels=choice.kernels,
        )

    def _version(
        self, state: State, assignment: Assignment, held: str | None, number: int
    ) -> Version:
        """The adapter a device starts from, that of round ``number`` being the state."""
        exact = self.parts.method.broadcast(state, self._space, assignment)
        return self._downlink.version(exact, held, round_number=number)

    def _contributions(self, state: State, updates: Sequence[UpdateRow]) -> Iterator[Contribution]:
        for update in updates:
            task = self._store.task(update.task_id)
            if task is None:
                raise LorikitError(f"update {update.update_id} has lost its task")
            content = read_update(
                self._private.read_whole(update.digest),
                expected_from_json(task.expected),
                max_norm=math.inf,
            )
            assignment = assignment_from_json(task.assignment)
            if content.changes or not self._downlink.is_exact:
                received = read_adapter(self._blobs.read_whole(task.adapter_digest))
                content = with_received(content, received)
            if not self._downlink.is_exact:
                exact = self.parts.method.broadcast(state, self._space, assignment)
                content = as_from_exact(content, received, exact)
            yield Contribution(
                device_id=update.device_id,
                assignment=assignment,
                tensors=content.tensors,
                scalars=content.scalars,
                examples=update.examples,
            )

    def _counted(self, number: int, device_id: str) -> tuple[int, str] | None:
        """The device's last counted update before round ``number``, if of late.

        Returns:
            Its round, and the digest of the adapter that it started from, which the device holds.
        """
        for earlier in range(number - 1, max(-1, number - _REMEMBERED_ROUNDS), -1):
            for update in self._store.updates(self._run_id, earlier):
                if update.device_id != device_id:
                    continue
                task = self._store.task(update.task_id)
                return earlier, "" if task is None else task.adapter_digest
        return None

    def _last_tasks(self) -> dict[str, TaskRow]:
        """The last training task of each device."""
        tasks = self._store.tasks(self._run_id)
        return {task.device_id: task for task in tasks if task.kind == "train"}

    def _ranks(self, tasks: Iterable[TaskRow]) -> list[int]:
        used = {json.loads(task.facts)["rank"] for task in tasks if task.kind == "train"}
        return sorted(rank for rank in used | {self._space.max_rank} if rank > 0)

    def _observations(self, rounds: int) -> Iterator[Observation]:
        """Predicted and measured peaks of every counted update."""
        facts = {task.id: json.loads(task.facts) for task in self._store.tasks(self._run_id)}
        for number in range(rounds):
            for update in self._store.updates(self._run_id, number):
                known = facts[update.task_id]
                yield Observation(
                    known["class"],
                    known["predicted_peak_memory_bytes"] / known["memory_factor"],
                    json.loads(update.report)["peak_memory_bytes"],
                )

    def _export(self, state: State, folder: Path, ranks: Iterable[int]) -> None:
        for rank in ranks:
            adapter = self.parts.method.global_adapter(state, self._space, rank)
            self.parts.export(folder / f"rank-{rank}", adapter, rank)

    def _final(
        self,
        state: State,
        rounds: int,
        device: DeviceRow,
        last: Mapping[str, TaskRow],
    ) -> tuple[Assignment, tuple[str, int]]:
        """Assignment and package (digest, size) a device ends with."""
        task = last.get(device.id)
        if task is not None:
            package = (task.package_digest, task.package_size)
            return assignment_from_json(task.assignment), package
        local = dict(state.devices.get(device.id, {}))
        participant = self._participant(device.id, device.profile, local)
        rng = np.random.default_rng(seed_of("final", self.config.seed, device.id))
        (assignment,) = self.parts.method.assign(state, self._space, rounds, [participant], rng)
        choice = self.parts.planner.choose(profile_from_json(device.profile), assignment)
        made = self._package(assignment, choice)
        return replace(assignment, precision=choice.precision), (made.ref.digest, made.ref.size)


def profile_from_json(text: str) -> Profile:
    """A profile as the store keeps it."""
    fields = json.loads(text)
    fields["engines"] = tuple(EngineInfo(**engine) for engine in fields["engines"])
    fields["operations"] = tuple(fields["operations"])
    fields["codecs"] = tuple(fields["codecs"])
    return Profile(**fields)


def _facts(plan: Plan, choice: Choice) -> str:
    facts = plan.facts
    return json.dumps(
        {
            "class": facts.device_class,
            "precision": facts.precision,
            "rank": facts.rank,
            "trained_layers": facts.trained_layers,
            "kept_layers": facts.kept_layers,
            "micro_batch": facts.micro_batch,
            "predicted_peak_memory_bytes": facts.predicted_peak_memory_bytes,
            "runtime": choice.runtime,
            "memory_factor": choice.memory_factor,
            "steps": sum(phase.steps for phase in plan.phases),
        },
        sort_keys=True,
    )
