# SPDX-License-Identifier: Apache-2.0
"""A plan with a wire scheme, from training to the bytes of the update."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.sdk.test_plan import ALL, PHASE, PLAN, A, Device, Dying

from lorikit.proto.plan import ADAPTIVE, Plan, WireScheme
from lorikit.proto.tensors import Tensors, pack
from lorikit.quantization import wire
from lorikit.sdk._errors import PlanRefusedError
from lorikit.sdk._plan import Outcome, PlanExecutor
from lorikit.sdk._store import Journal, Residuals

SCHEME = WireScheme(codec="int8-block64", compressed=False, stream="run", error_feedback=True)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(wire, "SMALL", 4)  # the package's tensors are tiny
    return Device(tmp_path)


def plan(**changes: object) -> Plan:
    scheme = dataclasses.replace(SCHEME, **changes)  # type: ignore[arg-type]  # of any kind
    return dataclasses.replace(PLAN, wire=scheme)


def executor(device: Device, engine: object = None, **options: int) -> PlanExecutor:
    return PlanExecutor(
        engine or device.engine(),  # type: ignore[arg-type]  # an engine
        device.package.manifest,
        device.data,
        journal=Journal(device.folder / "journal"),
        residuals=Residuals(device.folder / "residuals"),
        emit=lambda event: None,
        cancelled=lambda: False,
        **options,  # type: ignore[arg-type]  # steps
    )


def run(device: Device, wanted: Plan, task: str = "task-1") -> Outcome:
    return executor(device).run(wanted, device.package.adapter(), task)


def changes(outcome: Outcome) -> Tensors:
    header = outcome.bundle.wire
    assert header is not None
    return {n: wire.decode(e, n, header) for n, e in outcome.bundle.tensors.items()}


def test_update_holds_the_changes_of_training(device: Device) -> None:
    plain = device.run()
    sent = changes(run(device, plan(), "task-2"))

    assert sent.keys() == set(ALL)
    for name, before in device.package.adapter().items():
        after = plain.bundle.tensors[name].parts["values"]
        moved = np.abs(after - before).max()
        np.testing.assert_allclose(before + sent[name], after, atol=max(moved, 1e-9) / 200)


def test_killed_and_resumed_plan_ends_with_the_same_bytes_and_the_same_rest(
    device: Device, tmp_path: Path
) -> None:
    calm = run(device, plan(codec="int1"))
    rest = Residuals(device.folder / "residuals").load("run", 0, owner=owner(device, "int1"))
    assert rest is not None
    executor(device)._journal.clear("task-1")

    dying = Dying(device.engine(), runs=5)
    with pytest.raises(KeyboardInterrupt):
        executor(device, dying, journal_interval_steps=1).run(
            plan(codec="int1"), device.package.adapter(), "task-1"
        )
    again = run(device, plan(codec="int1"))

    assert pack(again.bundle) == pack(calm.bundle)
    kept = Residuals(device.folder / "residuals").load("run", 0, owner=owner(device, "int1"))
    assert kept is not None
    for name in ALL:
        np.testing.assert_array_equal(kept[name], rest[name])


def owner(device: Device, codec: str) -> str:
    return f"{codec}/{device.package.manifest.precision}"


def test_importance_is_the_optimisers_and_survives_a_kill(device: Device) -> None:
    wanted = plan(codec=ADAPTIVE, budget_bytes=120)
    calm = run(device, wanted)
    assert sum(each.nbytes for each in calm.bundle.tensors.values()) <= 120
    assert len({each.codec for each in calm.bundle.tensors.values()}) > 1

    executor(device)._journal.clear("task-1")
    phase = dataclasses.replace(PHASE, steps=2)
    two = dataclasses.replace(wanted, phases=(phase, dataclasses.replace(phase, train=(A,))))
    whole = run(device, two)
    executor(device)._journal.clear("task-1")
    with pytest.raises(KeyboardInterrupt):
        executor(device, Dying(device.engine(), runs=5), journal_interval_steps=1).run(
            two, device.package.adapter(), "task-1"
        )
    assert pack(run(device, two).bundle) == pack(whole.bundle)


def sizes(outcome: Outcome) -> dict[str, int]:
    return {name: each.nbytes for name, each in outcome.bundle.tensors.items()}


def test_weights_of_the_plan_move_the_bits_and_first_order_effects_survive_a_kill(
    device: Device,
) -> None:
    def wanted(**fields: object) -> Plan:
        return plan(codec=ADAPTIVE, budget_bytes=120, error_feedback=False, stream="", **fields)

    heavy, light = (
        run(device, wanted(importance="server", sensitivity={A: weight}), f"weight {weight}")
        for weight in (1e9, 0.0)
    )
    assert sizes(heavy)[A] > sizes(light)[A]

    first_order = wanted(importance="first-order")
    calm = run(device, first_order, "calm")
    with pytest.raises(KeyboardInterrupt):
        executor(device, Dying(device.engine(), runs=5), journal_interval_steps=1).run(
            first_order, device.package.adapter(), "killed"
        )
    assert pack(run(device, first_order, "killed").bundle) == pack(calm.bundle)


def test_compressed_update_unpacks_to_the_same(device: Device) -> None:
    loose = run(device, plan())
    executor(device)._journal.clear("task-1")
    tight = run(device, plan(compressed=True))

    assert len(pack(tight.bundle)) < len(pack(loose.bundle))
    assert pack(wire.expanded(tight.bundle, max_bytes=1 << 20)) == pack(loose.bundle)


def test_unknown_scheme_is_refused_before_training(device: Device) -> None:
    with pytest.raises(PlanRefusedError, match=r"unknown wire scheme 'int9'"):
        run(device, plan(codec="int9"))
    assert Journal(device.folder / "journal").load("task-1") is None
