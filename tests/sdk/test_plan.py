# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.engines.tiny_package import (
    BIAS,
    HEAD,
    INPUTS,
    A,
    B,
    TinyPackage,
    build_tiny_package,
    example_rows,
)

from lorikit.proto.plan import Operation, OptimizerConfig, Phase, Plan
from lorikit.proto.tensors import Bundle, Tensors, pack
from lorikit.quantization import codec
from lorikit.sdk._data import read_dataset
from lorikit.sdk._errors import (
    CancelledError,
    DataError,
    LorikitError,
    NonFiniteError,
    PackageError,
    PlanRefusedError,
)
from lorikit.sdk._events import Progress
from lorikit.sdk._optimizer import initial_slots, updated
from lorikit.sdk._plan import Outcome, PlanExecutor, _drawn
from lorikit.sdk._store import Journal
from lorikit.sdk.engines import open_engine
from lorikit.sdk.engines._signature import DROPOUT_SEED
from lorikit.sdk.engines.base import Batch, Engine, Evaluation, Gradients, Predictions

pytest.importorskip("onnxruntime", reason="plans run on the onnx engine")

ALL = (A, B, HEAD, BIAS)
PHASE = Phase(train=ALL, steps=7, batch_size=6, micro_batch=4, optimizer=OptimizerConfig())
PLAN = Plan(method="fedit", inputs=INPUTS, phases=(PHASE,), max_length=16, seed=11)


class Device:
    """A package, data and a journal on disk, as after a download."""

    def __init__(self, folder: Path, examples: int = 20) -> None:
        self.folder = folder
        self.package: TinyPackage = build_tiny_package(folder)
        manifest = self.package.manifest
        tokenizer = (folder / manifest.tokenizer.digest).read_bytes()
        self.data = read_dataset(example_rows(examples), manifest, tokenizer, 16)
        self.events: list[Progress] = []

    def engine(self) -> Engine:
        return open_engine("onnx", self.package.manifest, self.folder, threads=1)

    def executor(
        self,
        engine: Engine | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        **options: int,
    ) -> PlanExecutor:
        return PlanExecutor(
            engine or self.engine(),
            self.package.manifest,
            self.data,
            journal=Journal(self.folder / "journal"),
            emit=self.events.append,  # type: ignore[arg-type]  # only Progress is emitted
            cancelled=cancelled,
            **options,  # type: ignore[arg-type]
        )

    def run(self, plan: Plan = PLAN, adapter: Tensors | None = None) -> Outcome:
        return self.executor().run(plan, adapter or self.package.adapter(), "task-1")


class Dying:
    """An engine in a process that is killed after some runs of the graph."""

    def __init__(self, engine: Engine, runs: int) -> None:
        self._engine, self._runs = engine, runs

    def gradients(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Gradients:
        self._runs -= 1
        if self._runs < 0:
            raise KeyboardInterrupt
        return self._engine.gradients(adapter, batch, inputs)

    def loss(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Evaluation:
        self._runs -= 1
        if self._runs < 0:
            raise KeyboardInterrupt
        return self._engine.loss(adapter, batch, inputs)

    def predict(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Predictions:
        return self._engine.predict(adapter, batch, inputs)

    def close(self) -> None:
        self._engine.close()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def _decoded(outcome: Outcome) -> Tensors:
    tensors = outcome.bundle.tensors
    return {name: codec(each.codec).decode(each) for name, each in tensors.items()}


def test_training_lowers_the_loss(device: Device) -> None:
    phase = dataclasses.replace(PHASE, steps=40, optimizer=OptimizerConfig(learning_rate=0.03))
    report = device.run(dataclasses.replace(PLAN, phases=(phase,))).report

    assert report.last_loss < 0.3 * report.first_loss
    assert report.examples == 40 * 6
    assert report.dataset_size == 20
    assert report.steps == 40
    assert report.rank == 4
    assert 0.5 < report.accuracy <= 1
    assert report.peak_memory_bytes > 0


def test_micro_batches_change_nothing_but_the_rounding(device: Device) -> None:
    results = []
    for micro_batch in (1, 4, 6):
        phase = dataclasses.replace(PHASE, micro_batch=micro_batch)
        plan = dataclasses.replace(PLAN, phases=(phase,))
        results.append(_decoded(device.executor().run(plan, device.package.adapter(), "t")))
        device.executor()._journal.clear("t")
    for name in ALL:
        # Sums in another order differ in the last bits; AdamW's division enlarges that.
        np.testing.assert_allclose(results[1][name], results[0][name], atol=2e-5)
        np.testing.assert_allclose(results[2][name], results[0][name], atol=2e-5)


def test_whole_data_steps_equal_training_by_hand(device: Device) -> None:
    config = OptimizerConfig(learning_rate=0.01, clip_norm=0.5)
    phase = dataclasses.replace(PHASE, steps=3, batch_size=50, micro_batch=7, optimizer=config)
    sent = _decoded(device.run(dataclasses.replace(PLAN, phases=(phase,))))

    adapter = device.package.adapter()
    slots = {name: initial_slots(config, value) for name, value in adapter.items()}
    for step in range(3):
        gradients = device.package.reference(
            adapter, device.data.batch(range(20), 1 / 20)
        ).gradients
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        for name, gradient in gradients.items():
            adapter[name], slots[name] = updated(
                adapter[name], gradient * np.float32(min(1, 0.5 / norm)), slots[name], config,
                learning_rate=0.01, step=step,
            )  # fmt: skip
    for name in ALL:
        np.testing.assert_allclose(sent[name], adapter[name], atol=1e-5)


def test_only_the_phases_tensors_move(device: Device) -> None:
    first = dataclasses.replace(PHASE, name="head", train=(HEAD, BIAS), steps=2)
    second = dataclasses.replace(PHASE, name="lora", train=(B,), steps=3)
    outcome = device.run(dataclasses.replace(PLAN, phases=(first, second), send=ALL))

    sent, start = _decoded(outcome), device.package.adapter()
    assert [name for name in ALL if not np.array_equal(sent[name], start[name])] == [B, HEAD, BIAS]
    assert [(e.phase, e.step, e.steps) for e in device.events] == [
        ("head", 1, 5), ("head", 2, 5), ("lora", 3, 5), ("lora", 4, 5), ("lora", 5, 5),
    ]  # fmt: skip


def test_learning_rate_factor_of_zero_holds_a_role(device: Device) -> None:
    phase = dataclasses.replace(PHASE, learning_rate_factors={"lora_A": 0.0, "head": 2.0})
    sent = _decoded(device.run(dataclasses.replace(PLAN, phases=(phase,))))
    np.testing.assert_array_equal(sent[A], device.package.adapter()[A])
    assert not np.array_equal(sent[B], device.package.adapter()[B])


def test_same_plan_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path) -> None:
    sent = []
    for number, seed in enumerate((11, 11, 12)):
        (tmp_path / str(number)).mkdir()
        plan = dataclasses.replace(PLAN, seed=seed)
        sent.append(pack(Device(tmp_path / str(number)).run(plan).bundle))
    assert sent[0] == sent[1] != sent[2]


def test_small_data_set_is_used_whole_in_each_step(tmp_path: Path) -> None:
    report = Device(tmp_path, examples=4).run().report
    assert report.examples == 7 * 4


@pytest.mark.parametrize("runs", [0, 1, 5, 9, 13])
@pytest.mark.parametrize("interval", [1, 3])
def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path, runs: int, interval: int) -> None:
    phases = (PHASE, dataclasses.replace(PHASE, name="more", steps=2, seed=1))
    plan = dataclasses.replace(PLAN, phases=phases)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Device(tmp_path / "whole").run(plan)

    killed = Device(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.executor(Dying(killed.engine(), runs), journal_interval_steps=interval).run(
            plan, killed.package.adapter(), "task-1"
        )
    resumed = Device(tmp_path / "killed")
    outcome = resumed.run(plan)

    assert pack(outcome.bundle) == pack(whole.bundle)
    for number in ("examples", "first_loss", "last_loss", "accuracy", "steps"):
        assert getattr(outcome.report, number) == getattr(whole.report, number)
    # Each step takes two runs of the graph; what was journalled is not done again.
    journalled = runs // 2 // interval * interval
    assert len(resumed.events) == 9 - journalled


def test_killed_run_with_8_bit_states_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorikit.sdk._optimizer.SMALLEST", 1)
    plans = [_phase(optimizer=OptimizerConfig(state_bits=bits)) for bits in (8, 32)]
    for name in ("whole", "killed", "32"):
        (tmp_path / name).mkdir()
    whole = Device(tmp_path / "whole").run(plans[0])
    killed = Device(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.executor(Dying(killed.engine(), 9), journal_interval_steps=1).run(
            plans[0], killed.package.adapter(), "task-1"
        )
    assert pack(Device(tmp_path / "killed").run(plans[0]).bundle) == pack(whole.bundle)
    assert pack(Device(tmp_path / "32").run(plans[1]).bundle) != pack(whole.bundle)


def test_finished_task_is_not_trained_again(device: Device) -> None:
    first = device.run()
    device.events.clear()
    assert pack(device.run().bundle) == pack(first.bundle)
    assert device.events == []


def test_journal_of_another_plan_is_not_used(device: Device) -> None:
    device.run()
    device.events.clear()
    device.run(dataclasses.replace(PLAN, seed=12))
    assert len(device.events) == 7


def test_cancelled_run_keeps_what_it_has(device: Device) -> None:
    adapter = device.package.adapter()
    executor = device.executor(
        cancelled=lambda: len(device.events) == 4, journal_interval_steps=100
    )
    with pytest.raises(CancelledError):
        executor.run(PLAN, adapter, "task-1")
    device.events.clear()
    device.run()
    assert [event.step for event in device.events] == [5, 6, 7]


def test_pruned_adapter_is_sent_at_its_new_rank(device: Device) -> None:
    arguments = {"keep": 0.5, "min_rank": 1}
    penalty = Operation(name="tail_penalty", arguments={"weight": 5.0, **arguments})
    phase = dataclasses.replace(
        PHASE,
        steps=20,
        gradient_operations=(penalty,),
        optimizer=OptimizerConfig(learning_rate=0.02),
    )
    prune = Operation(name="prune_tail", arguments=arguments)
    outcome = device.run(dataclasses.replace(PLAN, phases=(phase,), operations=(prune,)))

    assert outcome.report.rank == 2
    assert outcome.bundle.scalars == {"examples": 20.0, "rank": 2.0}
    assert {name: each.shape for name, each in outcome.bundle.tensors.items()} == {
        A: (2, 12), B: (7, 2), HEAD: (3, 7), BIAS: (3,),
    }  # fmt: skip


def test_plan_of_operations_alone_sends_what_they_produce(device: Device) -> None:
    plan = dataclasses.replace(PLAN, phases=(), operations=(Operation(name="class_sums"),))
    outcome = device.run(plan)
    assert set(outcome.bundle.tensors) == {"statistics.class_sums", "statistics.class_counts"}
    assert outcome.report.steps == outcome.report.examples == 0


def test_update_travels_in_the_plans_codec(device: Device) -> None:
    outcome = device.run(dataclasses.replace(PLAN, codec="fp16", send=(B,)))
    assert {each.codec for each in outcome.bundle.tensors.values()} == {"fp16"}


def _phase(**changes: object) -> Plan:
    return dataclasses.replace(PLAN, phases=(dataclasses.replace(PHASE, **changes),))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (_phase(train=("nowhere.weight",)), r"trains nowhere\.weight, unknown"),
        (_phase(train=(A, A)), "lists a tensor twice"),
        (_phase(gradient_operations=(Operation(name="melt"),)), "melt@1 is unknown"),
        (dataclasses.replace(PLAN, operations=(Operation(name="melt"),)), "melt@1 is unknown"),
        (dataclasses.replace(PLAN, codec="int99"), "codec 'int99' is unknown"),
        (dataclasses.replace(PLAN, send=("nowhere",)), "sends nowhere"),
        (dataclasses.replace(PLAN, inputs={}), "no value for the graph's input 'lora_scale'"),
        (dataclasses.replace(PLAN, max_length=8), "cut at 16 tokens, the plan allows 8"),
    ],
)
def test_plan_that_cannot_be_carried_out_is_refused_before_the_first_step(
    device: Device, plan: Plan, message: str
) -> None:
    with pytest.raises(PlanRefusedError, match=message):
        device.run(plan)
    assert device.events == []


def test_tensor_without_gradient_cannot_be_trained(device: Device) -> None:
    held = tuple(
        dataclasses.replace(t, trained=t.name != A) for t in device.package.manifest.adapter
    )
    device.package = dataclasses.replace(
        device.package, manifest=dataclasses.replace(device.package.manifest, adapter=held)
    )
    with pytest.raises(PlanRefusedError, match=f"trains {A}, for which the package has no grad"):
        device.run()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (A, None, PackageError),
        (A, np.zeros((4, 11), np.float32), PackageError),
        (B, np.zeros((7, 3), np.float32), PackageError),
        (HEAD, np.zeros((3, 7)), PackageError),
        (BIAS, np.array([0, np.nan, 0], np.float32), NonFiniteError),
    ],
)
def test_adapter_that_does_not_fit_is_named(
    device: Device, name: str, value: np.ndarray | None, error: type[LorikitError]
) -> None:
    adapter = device.package.adapter()
    adapter.pop(name)
    if value is not None:
        adapter[name] = value
    with pytest.raises(error, match=name):
        device.run(adapter=adapter)


def test_diverging_run_names_what_is_not_finite(device: Device) -> None:
    with pytest.raises(NonFiniteError, match="is not finite"):
        device.run(_phase(optimizer=OptimizerConfig(name="sgd", learning_rate=1e30)))


def test_device_without_examples_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        Device(tmp_path, examples=0).run()


def test_received_adapter_stays_as_it_was(device: Device) -> None:
    adapter = device.package.adapter()
    device.run(adapter=adapter)
    for name, value in device.package.adapter().items():
        np.testing.assert_array_equal(adapter[name], value)


def test_outcome_can_be_packed(device: Device) -> None:
    bundle: Bundle = device.run().bundle
    assert len(pack(bundle)) > 0


class Listening(Dying):
    """An engine that notes the dropout seed of each run."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, 10**6)
        self.seeds: list[float] = []

    def gradients(self, adapter: Tensors, batch: Batch, inputs: Mapping[str, float]) -> Gradients:
        self.seeds.append(inputs[DROPOUT_SEED])
        return super().gradients(adapter, batch, inputs)


def _dropout_seeds(folder: Path, plan: Plan) -> list[float]:
    folder.mkdir()
    device = Device(folder)
    engine = Listening(device.engine())
    device.executor(engine).run(plan, device.package.adapter(), "task-1")
    return engine.seeds


def test_every_micro_batch_has_its_own_dropout_seed_and_a_repeated_run_the_same(
    tmp_path: Path,
) -> None:
    seeds = _dropout_seeds(tmp_path / "a", PLAN)
    assert len(set(seeds)) == len(seeds) == 14  # seven steps of two micro-batches
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert _dropout_seeds(tmp_path / "b", PLAN) == seeds
    assert not set(_dropout_seeds(tmp_path / "c", dataclasses.replace(PLAN, seed=12))) & set(seeds)
    other = dataclasses.replace(PLAN, phases=(dataclasses.replace(PHASE, seed=1),))
    assert not set(_dropout_seeds(tmp_path / "d", other)) & set(seeds)


def test_draws_count_the_epochs() -> None:
    phase = dataclasses.replace(PHASE, batch_size=2, micro_batch=2, steps=5)

    draws = np.concatenate(list(_drawn(3, phase, 1, 0)))

    np.testing.assert_array_equal(draws // 3, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    for epoch in range(3):
        assert sorted(draws[3 * epoch : 3 * epoch + 3] % 3) == [0, 1, 2]
    np.testing.assert_array_equal(np.concatenate(list(_drawn(3, phase, 1, 2))), draws[4:])
