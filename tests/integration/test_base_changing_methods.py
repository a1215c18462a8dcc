# SPDX-License-Identifier: Apache-2.0
"""FLoRA, FedEx-LoRA, FRLoRA and LoRA-A2 on real processes: what they change of the base travels.

Four devices over gRPC on the ``onnx`` engine with an nf4 base. In round 1 one of the first three is
killed, so the round stands still until it is back; the fourth comes meanwhile and works from round
2 on, with all that earlier rounds put into the base.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tests.integration.compiled_server import PRECISION, leave_parts
from tests.integration.conftest import TARGETS
from tests.integration.processes import LABELS, Device, Server, make_devices

from lorikit.proto.manifest import Task
from lorikit.proto.tensors import Bundle, Tensors, pack, raw
from lorikit.sdk._model import LocalModel
from lorikit.sdk._store import Store
from lorikit.server.app import make_method
from lorikit.server.config import RunConfig
from lorikit.server.export import read_adapter
from lorikit.server.methods import FACTS
from lorikit.server.methods.base import AdapterSpace, State
from lorikit.server.methods.base_delta import DELTA_ROLES, delta_tensors
from lorikit.server.methods.state import unpack_state
from lorikit.server.plans import assignment_from_json, expected_from_json
from lorikit.server.store.blobs import FolderBlobs
from lorikit.server.store.sql import SqlStore
from lorikit.server.updates import read_adapter as unpack_adapter

pytest.importorskip("torch", reason="the server compiles with torch")

pytestmark = pytest.mark.slow

ROUNDS = 3
METHODS = ("flora", "fedex-lora", "frlora", "lora-a2")


@pytest.fixture(scope="module")
def settings(run_settings):
    """Settings of a run of one method."""

    def settings(method: str) -> RunConfig:
        return run_settings(
            name=method,
            method=method,
            rounds=ROUNDS,
            min_devices=3,
            min_updates=3,
            local_steps=15,
        )

    return settings


@pytest.fixture(scope="module")
def compiler(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Compiles packages with base deltas; starts at the principal part of the weights."""
    compiling = importlib.import_module("lorikit.server.compile.compiler")
    insertion = importlib.import_module("lorikit.server.compile.insertion")
    return compiling.Compiler(
        tiny_model,
        Task(kind="sequence-classification", labels=LABELS),
        adapter=insertion.AdapterConfig(targets=TARGETS, delta_rank=64, principal_scale=2.0),
        blobs=FolderBlobs(tmp_path_factory.mktemp("base_changing") / "blobs"),
    )


@pytest.fixture(scope="module")
def packages(compiler, settings, tmp_path_factory: pytest.TempPathFactory):
    """Folder of the packages by method; all but FRLoRA start at B = 0."""
    config = settings("fedit")
    principal = compiler.initial(config.max_rank, config.seed)
    zero = {n: 0 * v if n.endswith("lora_B.weight") else v for n, v in principal.items()}
    folders: dict[str, Path] = {}
    for start, initial in (("random", zero), ("principal", principal)):
        folders[start] = tmp_path_factory.mktemp(start)
        (folders[start] / "blobs").symlink_to(compiler.blobs.folder)
        leave_parts(folders[start], compiler, config, initial=initial)
    return {method: folders[FACTS[method].start] for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_four_devices_one_killed_and_one_late(method, settings, packages, compiler, tmp_path):
    config = settings(method)
    with contextlib.ExitStack() as running:
        server = running.enter_context(
            Server(tmp_path / "server", compiled=packages[method]).start()
        )
        server.create(config)
        *first, late = devices = make_devices(tmp_path, server.address, 4)
        first[1].memory_limit = "1GB"  # half of the others': half the rank, where ranks may differ
        for device in first:
            running.enter_context(device.start())
        victim = first[0]
        victim.process.wait_for("TaskStarted", round=1)
        victim.process.kill()
        running.enter_context(late.start())
        late.process.wait_for("StateChanged", state="waiting")
        running.enter_context(victim.start())
        summary = server.ended(method)
        codes = [device.process.wait() for device in devices]
        ready = [device.process.seen("AdapterReady") for device in devices]

    assert (summary.state, summary.round, codes) == ("finished", ROUNDS, [0] * 4), summary
    assert [len(events) for events in ready] == [1] * 4
    report = json.loads((server.run_folder(method) / "report.json").read_text())
    done = [
        sorted(d["class"] for d in entry["devices"] if d["status"] == "done")
        for entry in report["rounds"]
    ]
    names = [device.name for device in devices]
    assert done[:2] == [names[:3]] * 2
    assert done[-1] == names
    space = compiler.space(config.max_rank)
    records = Records(server.folder / "runs" / ".server", method)
    assert_costs_are_those_of_the_formula(records, space, config)
    assert_late_device_is_not_behind(records, space, config)
    state = records.last_state()
    assert_folder_holds_deltas_and_lora(state, space, config, server)
    adapter = make_method(config).global_adapter(state, space)
    for device in (victim, late):
        assert_device_predicts(device, compiler, adapter, method=method)


class Records:
    """What a stopped server keeps of a run."""

    def __init__(self, folder: Path, run: str) -> None:
        self._blobs = FolderBlobs(folder / "blobs")
        self._private = FolderBlobs(folder / "updates")
        with contextlib.closing(SqlStore(f"sqlite:///{folder / 'lorikit.sqlite'}")) as store:
            run_id = store.run(run).id
            self.rounds = store.rounds(run_id)
            self.tasks = {task.id: task for task in store.tasks(run_id) if task.kind == "train"}
            self.updates = [u for row in self.rounds for u in store.updates(run_id, row.number)]

    def received(self, task_id: str) -> Tensors:
        """The adapter that a task started from."""
        return unpack_adapter(self._blobs.read_whole(self.tasks[task_id].adapter_digest))

    def last_state(self) -> State:
        """The method's state after the last round."""
        return unpack_state(self._private.read_whole(self.rounds[-1].state_digest))


def assert_costs_are_those_of_the_formula(
    records: Records, space: AdapterSpace, config: RunConfig
) -> None:
    """Bytes of every adapter sent and every update received, framing apart.

    The stack of FLoRA's authors reaches every device as everybody's adapter, K times the bytes;
    here a change has the rank of the sum, at most ``delta_rank`` and the width of the module.
    """
    assert len(records.updates) == 3 + 3 + 4
    for update in records.updates:
        task = records.tasks[update.task_id]
        work = assignment_from_json(task.assignment)
        received = records.received(task.id)
        deltas = {t.module: len(received[t.name]) for t in space.named("delta_A")}
        cost = FACTS[config.method].cost(space, {**work.ranks, **deltas}, round_number=task.round)
        assert cost.down == sum(values.nbytes for values in received.values())
        expected = expected_from_json(task.expected)
        names = {t.name: t.role for t in space.tensors}
        assert not {names[name] for name in expected} & set(DELTA_ROLES)  # never uploaded
        zeros = {name: np.zeros(each.shape, np.float32) for name, each in expected.items()}
        frame = framing(zeros)
        assert update.size == cost.up + frame


def assert_late_device_is_not_behind(
    records: Records, space: AdapterSpace, config: RunConfig
) -> None:
    """In the last round all read the same base, and it is not the one they began with."""
    last = [t.id for t in records.tasks.values() if t.round == ROUNDS - 1 and t.state == "done"]
    received = [records.received(task) for task in last]
    moved = [any(a[t.name].any() for t in space.named("delta_B")) for a in received]
    if config.method == "lora-a2":  # probed before: the ranks not chosen stand in the delta
        assert sorted(moved) == [False, False, False, True]  # three have memory for all ranks
        return
    assert moved == [True] * 4
    for tensor in space.named(*DELTA_ROLES):
        assert all(np.array_equal(a[tensor.name], received[0][tensor.name]) for a in received)


def assert_device_predicts(device: Device, compiler, adapter: Tensors, *, method: str) -> None:
    """What a new process makes of the device's store is what its package gives with the deltas."""
    manifest = compiler.package(precision=PRECISION, lowest_trained_layer=0).manifest
    path = compiler.blobs.path(manifest.graph("predict").blob.digest)
    session = onnxruntime.InferenceSession(str(path))
    words = [3, 25, 44]
    feeds = {
        "input_ids": np.array([[2, *(4 + word for word in words), 3]], np.int64),
        "attention_mask": np.ones((1, 5), np.int64),
        "lora_scale": np.asarray(2.0, np.float32),
        **adapter,
    }
    logits = session.run(["logits"], feeds)[0][0].astype(np.float64)
    with Store(device.store) as store:
        model = LocalModel(store, engine="onnx", threads=1)
        [found] = model.predict([" ".join(f"w{word}" for word in words)])
        model.close()
        held = unpack_adapter(store.blobs.path(store.last_adapter().adapter.digest).read_bytes())
    assert held.keys() == adapter.keys()
    shares = np.exp(logits) / np.exp(logits).sum()
    assert found.probability == pytest.approx(shares[LABELS.index(found.label)], abs=1e-5)
    assert found.probability == pytest.approx(shares.max(), abs=1e-5)
    if method != "lora-a2":  # which splits the same function in another way for each device
        assert all(np.array_equal(values, adapter[name]) for name, values in held.items())


def framing(tensors: Tensors) -> int:
    """Bytes of an update beside its values."""
    scalars = {"examples": 1.0, "rank": 1.0}
    size = len(pack(Bundle({name: raw(values) for name, values in tensors.items()}, scalars)))
    return size - sum(values.nbytes for values in tensors.values())


def assert_folder_holds_deltas_and_lora(
    state: State, space: AdapterSpace, config: RunConfig, server: Server
) -> None:
    """The PEFT folder of the largest rank is s B A and the change of the base, module by module."""
    folder = server.run_folder(config.name) / "adapter" / f"rank-{config.max_rank}"
    exported = read_adapter(folder).tensors
    s = config.lora_scale
    adapter = make_method(config).global_adapter(state, space)
    changes, learned = [], []
    for a, b in space.pairs():
        delta_a, delta_b = delta_tensors(a, b)
        change = adapter[delta_b.name].astype("f8") @ adapter[delta_a.name]
        whole = s * adapter[b.name].astype("f8") @ adapter[a.name] + change
        product = s * exported[b.name].astype("f8") @ exported[a.name]
        np.testing.assert_allclose(product, whole, atol=1e-4)
        changes.append(np.linalg.norm(change))
        learned.append(np.linalg.norm(whole))
    assert min(learned) > 1e-3  # it is 0 at the start, for all four
    # LoRA-A2 keeps nothing in the base; what does not train stands there while it is away.
    assert (min(changes) > 0) == (config.method != "lora-a2")
