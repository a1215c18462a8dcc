# SPDX-License-Identifier: Apache-2.0
"""A small federation: a real server, and devices that do arithmetic where others would train."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from lorikit.proto.device import EngineInfo, Profile, TrainingReport
from lorikit.proto.limits import (
    DEVICE_METADATA,
    ERROR_METADATA,
    PROTOCOL_METADATA,
    TOKEN_METADATA,
)
from lorikit.proto.manifest import AdapterTensor, BlobRef, Manifest, Task, dump, load
from lorikit.proto.plan import OPERATIONS
from lorikit.proto.status import ErrorCode
from lorikit.proto.tensors import Bundle, Tensors, pack, raw, unpack
from lorikit.proto.v1 import device_service_pb2 as messages
from lorikit.proto.v1.device_service_pb2_grpc import DeviceServiceStub
from lorikit.proto.wire import profile_to_message, report_to_message
from lorikit.server.app import Server, make_method
from lorikit.server.config import (
    LimitsConfig,
    RunConfig,
    ServerConfig,
    read_evaluation_data,
)
from lorikit.server.methods.base import AdapterSpace, Assignment, Participant
from lorikit.server.planner.choice import DoesNotFitError
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.work import RunParts

LABELS = ("cold", "warm", "hot")
WIDTH = 6
LAYERS = 2
MEBIBYTE = 1 << 20


def make_space(max_rank: int) -> AdapterSpace:
    tensors = []
    for layer in range(LAYERS):
        module = f"encoder.layer.{layer}.query"
        tensors += [
            _tensor(f"{module}.lora_A.weight", "lora_A", module, layer, ("rank", WIDTH)),
            _tensor(f"{module}.lora_B.weight", "lora_B", module, layer, (WIDTH + 1, "rank")),
        ]
    tensors += [
        _tensor("classifier.weight", "head", "classifier", -1, (len(LABELS), WIDTH)),
        _tensor("classifier.bias", "head", "classifier", -1, (len(LABELS),)),
    ]
    return AdapterSpace(tensors=tuple(tensors), layer_count=LAYERS, max_rank=max_rank)


def _tensor(name, role, module, layer, shape):
    return AdapterTensor(
        name=name, role=role, module=module, layer=layer, shape=shape, trained=True
    )


@dataclass(frozen=True)
class TinyPackage:
    manifest: Manifest
    ref: BlobRef


@dataclass
class TinySource:
    """Packages that hold a manifest and one blob, and a linear model over letter counts."""

    blobs: FolderBlobs
    layer_count: int = LAYERS

    def space(self, max_rank: int) -> AdapterSpace:
        return make_space(max_rank)

    def initial(self, max_rank: int, seed: int) -> Tensors:
        rng = np.random.default_rng(seed)
        values = {}
        for tensor in make_space(max_rank).tensors:
            shape = [max_rank if n == "rank" else int(n) for n in tensor.shape]
            random = np.zeros(shape) if tensor.role == "lora_B" else rng.normal(size=shape)
            values[tensor.name] = random.astype(np.float32)
        return values

    def package(
        self,
        *,
        precision: str,
        lowest_trained_layer: int,
        kept_layers: Sequence[int] | None = None,
        runtime: str = "onnx",
        recomputed_layers: Sequence[int] = (),
        kernels: str = "lean",
    ) -> TinyPackage:
        kept = tuple(range(LAYERS)) if kept_layers is None else tuple(kept_layers)
        weights = self.blobs.put(precision.encode() * 1000)
        adapter = [
            AdapterTensor(
                name=t.name,
                role=t.role,
                module=t.module,
                layer=t.layer,
                shape=t.shape,
                trained=t.layer < 0 or t.layer >= lowest_trained_layer,
            )
            for t in make_space(1).tensors
            if t.layer < 0 or t.layer in kept
        ]
        manifest = Manifest(
            model="tiny",
            model_digest="0" * 64,
            architecture="Tiny",
            layer_count=LAYERS,
            precision=precision,
            kept_layers=kept,
            lowest_trained_layer=lowest_trained_layer,
            task=Task(kind="sequence-classification", labels=LABELS),
            graphs=(),
            adapter=tuple(adapter),
            weights=(),
            weight_blobs=(weights,),
            tokenizer=None,
            probe=None,
        )
        return TinyPackage(manifest, self.blobs.put(dump(manifest)))

    def logits(
        self, adapter: Tensors, texts: Sequence[str], *, lora_scale: float, max_length: int
    ) -> np.ndarray:
        counts = np.array([[text.count(letter) for letter in "abcdef"] for text in texts], "f4")
        return counts @ adapter["classifier.weight"].T + adapter["classifier.bias"]


@dataclass
class TinyPlanner:
    """Every 10 MiB give one rank."""

    max_rank: int

    def participant(
        self,
        device_id: str,
        profile: Profile,
        local: Mapping[str, float],
        seconds_per_step: float | None = None,
    ) -> Participant:
        rank = min(self.max_rank, profile.memory_limit_bytes // (10 * MEBIBYTE))
        if rank < 1:
            raise DoesNotFitError("Rank 1 takes 10 MiB.", "Allow the app 10 MiB.")
        return Participant(
            device_id=device_id,
            device_class=profile.device_class,
            memory_limit_bytes=profile.memory_limit_bytes,
            max_rank=rank,
            max_depth=LAYERS,
            max_layers=LAYERS,
            seconds_per_step=seconds_per_step or 1.0,
            local=local,
        )

    def choose(self, profile: Profile, assignment: Assignment) -> TinyChoice:
        return TinyChoice()


@dataclass(frozen=True)
class TinyChoice:
    precision: str = "fp32"
    micro_batch: int = 1
    predicted_peak_memory_bytes: int = 5 * MEBIBYTE
    runtime: str = "onnx"
    recomputed_layers: tuple[int, ...] = ()
    kernels: str = "lean"
    memory_factor: float = 1.0


def export_npz(folder: Path, adapter: Tensors, rank: int) -> None:
    """The bytes of the adapter, so that tests can compare runs bit for bit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter.bundle").write_bytes(pack(Bundle({n: raw(t) for n, t in adapter.items()})))
    (folder / "rank.json").write_text(json.dumps(rank))


def open_tiny_parts(config: RunConfig, blobs: FolderBlobs) -> RunParts:
    evaluation = None
    if config.evaluation_data is not None:
        evaluation = read_evaluation_data(config.evaluation_data, config.task)
    return RunParts(
        method=make_method(config),
        source=TinySource(blobs),
        planner=TinyPlanner(config.max_rank),
        export=export_npz,
        evaluation=evaluation,
    )


def server_config(folder: Path, **changes: Any) -> ServerConfig:
    settings: dict[str, Any] = {
        "folder": folder,
        "address": "localhost:0",
        "lease_seconds": 5.0,
        "settle_seconds": 10.0,
        "max_wait_seconds": 5.0,
        "retry_seconds": 0.05,
        "handout_seconds": 0.0,
        "stop_seconds": 0.2,
        "limits": LimitsConfig(busy_retry_seconds=0.1),
    }
    return ServerConfig(**{**settings, **changes})


def run_config(folder: Path, **changes: Any) -> RunConfig:
    rows = folder / "test.jsonl"
    if not rows.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows.write_text(
            "".join(
                json.dumps({"text": text, "label": label}) + "\n"
                for text, label in (("aab", "cold"), ("cdd", "warm"), ("eff", "hot"), ("fa", "hot"))
            )
        )
    settings: dict[str, Any] = {
        "name": "test",
        "model": folder,
        "labels": LABELS,
        "rounds": 3,
        "min_devices": 3,
        "min_updates": min(2, changes.get("min_devices", 3)),
        "deadline_seconds": 30.0,
        "max_rank": 4,
        "local_steps": 3,
        "batch_size": 4,
        "evaluation_data": rows,
        "seed": 7,
    }
    return RunConfig(**{**settings, **changes})


def profile(memory_mebibytes: int = 40, **changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "device_class": f"{memory_mebibytes}mb",
        "memory_limit_bytes": memory_mebibytes * MEBIBYTE,
        "cores": 2,
        "platform": "test",
        "sdk_version": "0",
        "engines": (EngineInfo(name="onnx", version="1"),),
        "plan_version": 1,
        "operations": tuple(f"{name}@{version}" for name, version in OPERATIONS.items()),
        "codecs": ("fp32", "fp16"),
    }
    return Profile(**{**fields, **changes})


def train(task: messages.Task, adapter: Tensors, examples: int) -> Tensors:
    """What a device sends: the adapter moved by numbers that depend on the plan's seed alone."""
    names = [name for phase in task.plan.phases for name in phase.train]
    moved: Tensors = {}
    for name in names:
        rng = np.random.default_rng([task.plan.seed, len(name), *name.encode()])
        step = rng.normal(scale=0.1, size=adapter[name].shape)
        moved[name] = (adapter[name] + step).astype(np.float32)
    for operation in task.plan.operations:
        if operation.name == "class_sums":
            rng = np.random.default_rng(task.plan.seed)
            sums = rng.normal(size=(len(LABELS), WIDTH))
            moved["statistics.class_sums"] = sums.astype(np.float32)
            moved["statistics.class_counts"] = np.full(len(LABELS), examples, np.float32)
    return moved


@dataclass
class Device:
    """One device; every call is one remote call."""

    address: str
    name: str = "installation-0"
    profile: Profile = field(default_factory=profile)
    examples: int = 10
    protocol: str = "1"
    device_id: str = ""
    token: str = ""
    credentials: grpc.ChannelCredentials | None = None

    def __post_init__(self) -> None:
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        if self.credentials is None:
            self.channel = grpc.insecure_channel(self.address, options=options)
        else:
            self.channel = grpc.secure_channel(self.address, self.credentials, options=options)
        self.stub = DeviceServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    @property
    def metadata(self) -> list[tuple[str, str]]:
        known = [(PROTOCOL_METADATA, self.protocol)]
        if self.device_id and self.token:
            known += [(DEVICE_METADATA, self.device_id), (TOKEN_METADATA, self.token)]
        return known

    def call(self, method: str, request: Any, timeout: float = 20.0) -> Any:
        return getattr(self.stub, method)(request, metadata=self.metadata, timeout=timeout)

    def enrol(self) -> Device:
        request = messages.EnrolRequest(
            installation_id=self.name, profile=profile_to_message(self.profile)
        )
        answer = self.call("Enrol", request)
        self.device_id, self.token = answer.device_id, answer.token
        return self

    def next_task(self, wait_seconds: float = 5.0) -> messages.NextTaskResponse:
        return self.call("NextTask", messages.NextTaskRequest(wait_seconds=wait_seconds))

    def task(self) -> messages.Task:
        """The next task, however long it takes."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            answer = self.next_task(1.0)
            if answer.WhichOneof("outcome") == "task":
                return answer.task
        raise AssertionError(f"no task for {self.name}, but {answer}")

    def download(self, ref: messages.BlobRef, offset: int = 0) -> bytes:
        request = messages.DownloadBlobRequest(digest=ref.digest, offset=offset)
        data = b""
        for chunk in self.call("DownloadBlob", request):
            assert chunk.offset == offset + len(data)
            assert hashlib.sha256(chunk.data).digest() == chunk.chunk_digest
            data += chunk.data
        return data

    def update(self, task: messages.Task) -> bytes:
        bundle = unpack(self.download(task.adapter))
        adapter = {n: np.asarray(e.parts["values"], np.float32) for n, e in bundle.tensors.items()}
        return self.packed(train(task, adapter, self.examples))

    def packed(self, tensors: Tensors) -> bytes:
        scalars = {"examples": float(self.examples), "rank": 1.0}
        return pack(Bundle({n: raw(t) for n, t in tensors.items()}, scalars))

    def upload_status(self, task: messages.Task, data: bytes) -> messages.UploadStatusResponse:
        request = messages.UploadStatusRequest(
            task_id=task.task_id,
            update_id=task.update_id,
            digest=hashlib.sha256(data).hexdigest(),
        )
        return self.call("UploadStatus", request)

    def upload(
        self, task: messages.Task, data: bytes, *, offset: int = 0, stop: int | None = None
    ) -> messages.UploadUpdateResponse:
        requests = upload_requests(task, data, offset=offset, stop=stop, examples=self.examples)
        return self.call("UploadUpdate", requests)

    def heartbeat(self, task: messages.Task) -> messages.HeartbeatResponse:
        request = messages.HeartbeatRequest(task_id=task.task_id, state="training", step=1, steps=3)
        return self.call("Heartbeat", request)

    def fail(self, task: messages.Task) -> None:
        request = messages.ReportFailureRequest(
            task_id=task.task_id, error="OutOfMemoryError", message="no memory"
        )
        self.call("ReportFailure", request)

    def work(self, task: messages.Task) -> None:
        """Do one task to its end."""
        load(self.download(task.package))
        if task.kind == "evaluate":
            request = messages.ReportEvaluationRequest(
                task_id=task.task_id, metrics={"accuracy": 0.5}, examples=self.examples
            )
            self.call("ReportEvaluation", request)
        else:
            self.upload(task, self.update(task))

    def take_part(self, stop: threading.Event) -> messages.Finished | messages.Refusal | None:
        """Work until the run ends, whatever happens to the server meanwhile."""
        while not stop.is_set():
            try:
                if not self.device_id:
                    self.enrol()
                answer = self.next_task(2.0)
                outcome = answer.WhichOneof("outcome")
                if outcome in ("finished", "refused"):
                    return getattr(answer, outcome)
                if outcome == "task":
                    self.work(answer.task)
            except grpc.RpcError:
                stop.wait(0.05)
        return None


def upload_requests(
    task: messages.Task,
    data: bytes,
    *,
    offset: int = 0,
    stop: int | None = None,
    chunk_bytes: int = 300,
    total_size: int | None = None,
    digest: str = "",
    examples: int = 10,
) -> Iterator[messages.UploadUpdateRequest]:
    header = messages.UploadHeader(
        task_id=task.task_id,
        update_id=task.update_id,
        digest=digest or hashlib.sha256(data).hexdigest(),
        total_size=len(data) if total_size is None else total_size,
        offset=offset,
        report=report_to_message(
            TrainingReport(
                examples=30, dataset_size=examples, steps=3, engine="arithmetic", last_loss=0.5
            )
        ),
    )
    yield messages.UploadUpdateRequest(header=header)
    for start in range(offset, len(data) if stop is None else stop, chunk_bytes):
        piece = data[start : start + chunk_bytes]
        chunk = messages.UploadChunk(
            offset=start, data=piece, chunk_digest=hashlib.sha256(piece).digest()
        )
        yield messages.UploadUpdateRequest(chunk=chunk)


def error_code(error: grpc.RpcError) -> ErrorCode:
    """The code in the trailing metadata of a refused call."""
    assert isinstance(error, grpc.Call)
    trailing = dict(error.trailing_metadata() or ())
    return ErrorCode(str(trailing[ERROR_METADATA]))


class Crowd:
    """Devices in threads."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self.devices = list(devices)
        self.endings: dict[str, Any] = {}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(d,)) for d in self.devices]

    def _run(self, device: Device) -> None:
        self.endings[device.name] = device.take_part(self._stop)

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for device in self.devices:
            device.close()

    def join(self, timeout: float = 30.0) -> None:
        for thread in self._threads:
            thread.join(timeout)


def crowd(address: str, count: int = 3, memory: Sequence[int] = (20, 40, 40)) -> Crowd:
    return Crowd(
        Device(
            address,
            name=f"installation-{number}",
            profile=profile(memory[number % len(memory)]),
            examples=10 * (number + 1),
        )
        for number in range(count)
    )


def final_adapters(folder: Path) -> dict[str, bytes]:
    """Every exported adapter of a run, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("adapter.bundle"))
    }


def eventually(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("did not happen in time")
        time.sleep(0.01)


def start_server(config: ServerConfig, **changes: Any) -> Server:
    return Server(config, open_parts=changes.get("open_parts", open_tiny_parts)).start()
