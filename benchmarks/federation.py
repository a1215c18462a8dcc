# SPDX-License-Identifier: Apache-2.0
"""A federation in one process, for benchmarks: real server work, real device work, no network.

The server's part is ``RoundWork`` on a real store and real blobs, so that assignment, plans, checks
of updates, aggregation and states are those of a run. A device's part is the SDK's executor with
its journal and its residuals. Between them go the messages of the contract, which are counted as
they are serialised. What devices share here and nowhere else is the opened engine of a package and
the memory of one process. Base model and packages are compiled once for all runs of a process.

    shared = CompiledModel(folder, task, cache=Path("cache"), targets=("query", "value"))
    federation = Federation(shared, config, members, folder=Path("run"), test=test_rows)
    for _ in range(config.rounds):
        print(federation.round())
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorikit.proto.manifest import BlobRef, Manifest, Task, digest_of, load
from lorikit.proto.tensors import Tensors, pack
from lorikit.proto.v1 import device_service_pb2 as messages
from lorikit.proto.wire import report_to_message
from lorikit.sdk._config import ClientConfig
from lorikit.sdk._connection import Connection
from lorikit.sdk._data import Dataset, Row, read_dataset
from lorikit.sdk._inference import measure
from lorikit.sdk._packages import Packages, read_adapter
from lorikit.sdk._plan import PlanExecutor
from lorikit.sdk._profile import profile as device_profile
from lorikit.sdk._store import Store
from lorikit.sdk._transport import Task as DeviceTask
from lorikit.sdk._transport import _offer, _upload_messages
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines.base import Engine
from lorikit.server.app import make_method
from lorikit.server.compile import Compiler
from lorikit.server.config import EvaluationData, RunConfig
from lorikit.server.demo.split import dirichlet_split
from lorikit.server.methods.base import Assignment, Participant, State
from lorikit.server.methods.base_correction import Bases
from lorikit.server.methods.state import pack_state
from lorikit.server.planner.planner import Choice
from lorikit.server.plans import expected_from_json, identifier
from lorikit.server.service import _task
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import TaskRow
from lorikit.server.tasks import Offer, _profile_to_json
from lorikit.server.updates import read_update
from lorikit.server.uploads import _plain
from lorikit.server.work import Package, RoundWork, RunParts

CHUNK_BYTES = 1 << 20
GRPC_PREFIX_BYTES = 5
"""gRPC puts a flag and a length before each message."""


class CompiledModel:
    """A base model, its packages and their engines, shared by all runs of a process."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        *,
        cache: Path,
        targets: Sequence[str] = (),
        threads: int = 1,
        **compiler: Any,  # further arguments of the compiler
    ) -> None:
        self.blobs = FolderBlobs(cache)
        self.compiler = Compiler(folder, task, targets=targets, blobs=self.blobs, **compiler)
        self.task = task
        self._threads = threads
        self._engines: dict[str, tuple[Manifest, Engine]] = {}

    def package(self, precision: str, *, trained_layers: int, **variant: Any) -> Package:
        """The package whose last layers train."""
        lowest = self.compiler.layer_count - trained_layers
        return self.compiler.package(precision=precision, lowest_trained_layer=lowest, **variant)

    def opened(self, package: BlobRef) -> tuple[Manifest, Engine]:
        """A package's manifest and engine, opened at the first call."""
        if package.digest not in self._engines:
            manifest = load(self.blobs.read_whole(package.digest))
            engine = open_engine("onnx", manifest, self.blobs.folder, threads=self._threads)
            self._engines[package.digest] = manifest, engine
        return self._engines[package.digest]

    def dataset(self, rows: Iterable[Row], manifest: Manifest, max_length: int) -> Dataset:
        """Rows as a device reads them."""
        blob = manifest.tokenizer
        tokenizer = None if blob is None else self.blobs.read_whole(blob.digest)
        return read_dataset(rows, manifest, tokenizer, max_length)

    def measure(
        self, package: BlobRef, adapter: Tensors, data: Dataset, *, lora_scale: float
    ) -> dict[str, float]:
        """Accuracy and loss as a device that holds this package has them."""
        manifest, engine = self.opened(package)
        return measure(engine, manifest.task, data, adapter, {"lora_scale": lora_scale}, most=32)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A device of the federation."""

    name: str
    rows: Sequence[Row]
    precision: str = "fp32"
    """Of its base."""
    micro_batch: int = 0
    """Examples per run of the graph; 0 for the whole batch."""
    max_rank: int = 0
    """Largest rank it takes; 0 for the run's."""
    kernels: str = "lean"
    memory_limit_bytes: int = 1 << 30


def split_rows(
    rows: Sequence[Row],
    *,
    devices: int,
    by: str,
    seed: int,
    concentration: float = 1.0,
    smallest: int = 32,
) -> list[list[Row]]:
    """Rows dealt out by a column's values in Dirichlet proportions, shuffled on each device."""
    parts = dirichlet_split(
        [row[by] for row in rows],
        devices=devices,
        concentration=concentration,
        seed=seed,
        smallest=smallest,
    )
    rng = np.random.default_rng(seed)
    return [[rows[index] for index in rng.permutation(part)] for part in parts]


@dataclass(frozen=True)
class Traffic:
    """Bytes of the messages of one device in one round, gRPC's prefixes included."""

    up: int = 0
    down: int = 0
    update: int = 0
    """Of them the update itself, as it lies in a file."""
    adapter: int = 0
    """Of those down the adapter itself, in whatever form it travels."""


@dataclass(frozen=True)
class Round:
    """What came of one round."""

    number: int
    traffic: Mapping[str, Traffic]
    """By device name."""
    last_loss: Mapping[str, float]
    """By device name, over its last step."""
    accuracy: float | None
    """Of the aggregated adapter on the test rows, with the fp32 base; None if not measured."""
    loss: float | None


class Federation:
    """One run."""

    def __init__(
        self,
        model: CompiledModel,
        config: RunConfig,
        members: Sequence[Member],
        *,
        folder: Path,
        test: Sequence[Row] = (),
        start: Tensors | None = None,
    ) -> None:
        """Args.

        Args:
            model: The compiled base; several runs share it.
            config: Settings of the run; ``rounds`` counts for schedules only, ``round`` goes on.
            members: The devices.
            folder: Where the server's store and the devices' stores go; empty at the start.
            test: Rows that ``round`` measures on, with fp32 base on the server.
            start: Adapter that the method starts from, at the run's largest rank; None for the
                compiler's own. So several runs can share a head start.
        """
        self.model = model
        self.config = config
        self.store = SqlStore(f"sqlite:///{_made(folder) / 'server.sqlite'}")
        self._kept = FolderBlobs(folder / "updates")
        self._number = 0
        self._run_id = identifier("run", config.name)
        self.devices = {
            identifier("device", member.name): LocalDevice(member, model, folder / member.name)
            for member in members
        }
        self.work = RoundWork(
            self._run_id,
            config,
            RunParts(
                method=make_method(config, _bases(model, config)),
                source=model.compiler,
                planner=GivenChoices(config, members, model.compiler.layer_count),
                export=lambda *_: None,
                evaluation=_evaluation(test, config) if test else None,
            ),
            store=self.store,
            blobs=model.blobs,
            private=self._kept,
            folder=folder / "results",
        )
        self.store.create_run(self._run_id, config.name, config.canonical())
        self.store.start_run(self._run_id, initial_digest=self._first_state(start))
        for device_id, device in self.devices.items():
            self.store.enrol(
                device_id,
                installation_id=device.member.name,
                token_hash="",
                profile=_profile_to_json(device.profile),
                max_devices=len(self.devices),
            )
            self.store.join(self._run_id, device_id)

    def _first_state(self, start: Tensors | None) -> str:
        if start is None:
            return self.work.first_state()
        space = self.model.compiler.space(self.config.max_rank)
        state = self.work.parts.method.start(space, start)
        return self._kept.put(pack_state(state)).digest

    @property
    def state(self) -> State:
        """The method's state after the rounds done so far."""
        return self.work.state_before(self._number)

    def adapter(self, rank: int | None = None) -> Tensors:
        """The global adapter after the rounds done so far."""
        space = self.model.compiler.space(self.config.max_rank)
        return self.work.parts.method.global_adapter(self.state, space, rank)

    def round(self, *, is_measured: bool = True) -> Round:
        """Carry one round out with all devices."""
        number = self._number
        row = self.store.open_round(self._run_id, number)
        participants, refused = self.work.consider(self.work.state_before(number), self.devices)
        assert not refused, refused
        self.store.start_training(self._run_id, number, self.work.assign(row, participants))
        traffic, losses = {}, {}
        for task in self.store.tasks(self._run_id, number):
            device = self.devices[task.device_id]
            traffic[device.member.name], losses[device.member.name] = self._trained(task, device)
        self.store.start_aggregating(self._run_id, number)
        digest = self.work.aggregate(number)
        self.store.start_evaluating(self._run_id, number, state_digest=digest)
        metrics: Mapping[str, float] = {}
        count = 0
        if is_measured and self.work.parts.evaluation is not None:
            metrics, count = self.work.evaluate(number)
        self.store.close_round(self._run_id, number, metrics=metrics or None, examples=count)
        self.work.forget_updates(number)
        self._number += 1
        return Round(number, traffic, losses, metrics.get("accuracy"), metrics.get("loss"))

    def close(self) -> None:
        """Give the devices' stores and the database back."""
        for device in self.devices.values():
            device.store.close()
        self.store.close()

    def _trained(self, row: TaskRow, device: LocalDevice) -> tuple[Traffic, float]:
        """One device's task: its message, the training, and the update's receipt."""
        answer = messages.NextTaskResponse(task=_task(Offer(row, 60.0), lambda _: b""))
        task = _offer(answer)
        assert isinstance(task, DeviceTask), task
        device.transport.start()
        data, report = device.train(task)
        update = read_update(
            data, expected_from_json(row.expected), max_norm=self.config.max_update_norm
        )
        self.store.accept_update(
            row.id,
            digest=self._kept.put(data).digest,
            size=len(data),
            examples=int(update.scalars["examples"]),
            report=_plain(report),
        )
        sent = device.transport.upload(task, data, report)
        received = device.transport.received + _framed(answer)
        traffic = Traffic(sent, received, len(data), device.transport.blob_bytes)
        return traffic, report.last_loss


class LocalDevice:
    """One device: its store, its rows, and the SDK's executor on a shared engine."""

    def __init__(self, member: Member, model: CompiledModel, folder: Path) -> None:
        self.member = member
        self.model = model
        self.store = Store(folder)
        self.transport = LocalTransport(model.blobs)
        self.profile = dataclasses.replace(
            device_profile(
                memory_limit_bytes=member.memory_limit_bytes,
                device_class=member.precision,
                threads=1,
                probe_speed=False,
            ),
            speed_gflops=10.0,
        )
        self._packages = Packages(
            self.store.blobs,
            self.transport,  # type: ignore[arg-type]  # all that is asked of it is to download
            Connection(ClientConfig(), emit=lambda _: None),
            emit=lambda _: None,
        )
        self._data: dict[tuple[object, ...], Dataset] = {}

    def train(self, task: DeviceTask) -> tuple[bytes, Any]:
        """The update of a task, packed, and the report."""
        manifest, engine = self.model.opened(task.package)
        adapter = self.received(task, manifest)
        executor = PlanExecutor(
            engine,
            manifest,
            self._dataset(manifest, task.plan.max_length),
            journal=self.store.journal,
            residuals=self.store.residuals,
            emit=lambda _: None,
            cancelled=lambda: False,
            journal_interval_steps=1 << 30,
            journal_interval_seconds=float("inf"),
        )
        outcome = executor.run(task.plan, adapter, task.task_id)
        self.store.journal.clear(task.task_id)
        return pack(outcome.bundle), outcome.report

    def received(self, task: DeviceTask, manifest: Manifest) -> Tensors:
        """The adapter that the task starts from."""
        names = [tensor.name for tensor in manifest.adapter]
        self._packages.fetch_adapter(task.adapter, task.change, names)
        return read_adapter(self.store.blobs, task.adapter, manifest)

    def _dataset(self, manifest: Manifest, max_length: int) -> Dataset:
        key = (manifest.tokenizer, manifest.task, max_length)
        if key not in self._data:
            self._data[key] = self.model.dataset(self.member.rows, manifest, max_length)
        return self._data[key]


class LocalTransport:
    """Blobs and updates as messages in memory, counted."""

    def __init__(self, blobs: FolderBlobs) -> None:
        self._blobs = blobs
        self.start()

    def start(self) -> None:
        """Count from zero."""
        self.sent = self.received = self.blob_bytes = 0

    def download(self, blob: BlobRef, offset: int) -> Iterator[bytes]:
        """See ``Transport``."""
        self.sent += _framed(messages.DownloadBlobRequest(digest=blob.digest, offset=offset))
        for start in range(offset, blob.size, CHUNK_BYTES):
            data = self._blobs.read(blob.digest, start, CHUNK_BYTES)
            self.received += _framed(
                messages.DownloadBlobResponse(
                    offset=start, data=data, chunk_digest=bytes(32), total_size=blob.size
                )
            )
            self.blob_bytes += len(data)
            yield data

    def upload(self, task: DeviceTask, data: bytes, report: Any) -> int:
        """Bytes sent since ``start``, this update included."""
        digest = digest_of(data)
        names = {"task_id": task.task_id, "update_id": task.update_id, "digest": digest}
        header = messages.UploadHeader(
            **names, total_size=len(data), report=report_to_message(report)
        )
        self.sent += _framed(messages.UploadStatusRequest(**names))
        self.sent += sum(map(_framed, _upload_messages(header, data, lambda _: None)))
        self.received += _framed(messages.UploadStatusResponse())
        self.received += _framed(messages.UploadUpdateResponse(update_id=task.update_id))
        return self.sent


class GivenChoices:
    """A planner that gives every device what its member says."""

    def __init__(self, config: RunConfig, members: Sequence[Member], layer_count: int) -> None:
        self._config = config
        self._members = {identifier("device", member.name): member for member in members}
        self._layer_count = layer_count

    def participant(
        self,
        device_id: str,
        profile: Any,
        local: Mapping[str, float],
        seconds_per_step: float | None = None,
    ) -> Participant:
        """See ``DevicePlanner``."""
        member = self._members[device_id]
        return Participant(
            device_id=device_id,
            device_class=profile.device_class,
            memory_limit_bytes=member.memory_limit_bytes,
            max_rank=member.max_rank or self._config.max_rank,
            max_depth=self._layer_count,
            max_layers=self._layer_count,
            seconds_per_step=seconds_per_step or 1.0,
            local=local,
        )

    def choose(self, profile: Any, assignment: Assignment) -> Choice:
        """See ``DevicePlanner``."""
        member = self._members[assignment.device_id]
        return Choice(
            precision=member.precision,
            micro_batch=member.micro_batch or self._config.batch_size,
            predicted_peak_memory_bytes=0,
            runtime="onnx",
            kernels=member.kernels,
        )


def _bases(model: CompiledModel, config: RunConfig) -> Bases | None:
    """What a correction that the settings name needs; ``auto`` leaves it out."""
    if config.base_correction == "auto":
        return None
    return model.compiler.bases(config.possible_precisions)


def _evaluation(rows: Sequence[Row], config: RunConfig) -> EvaluationData:
    task = config.task
    texts = [str(row[task.text_column]) for row in rows]
    labels = [task.labels.index(str(row[task.label_column])) for row in rows]
    return EvaluationData(texts, labels)


def _framed(message: Any) -> int:
    return message.ByteSize() + GRPC_PREFIX_BYTES


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
