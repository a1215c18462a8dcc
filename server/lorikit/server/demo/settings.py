# SPDX-License-Identifier: Apache-2.0
"""What the demo does: its device classes, its run, and the short form of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from lorikit.proto.plan import OptimizerConfig
from lorikit.server.config import Precision, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoClass:
    """A kind of device in the demo."""

    name: str
    memory_limit_bytes: int
    """Enforced on each process of the class."""
    speed_gflops: float
    """Speed the devices declare. They share one machine, so that measuring would make them equal;
    LEGEND chooses depths by it."""
    precisions: tuple[Precision, ...] = ()
    """Precisions of the base that its devices may get; empty for those of the run."""


CLASSES = (
    DemoClass(
        name="wearable-128mb",
        memory_limit_bytes=128_000_000,
        speed_gflops=8.0,
        precisions=("nf4",),
    ),
    DemoClass(name="phone-512mb", memory_limit_bytes=512_000_000, speed_gflops=16.0),
    DemoClass(name="tablet-2gb", memory_limit_bytes=2_000_000_000, speed_gflops=30.0),
    DemoClass(name="laptop-8gb", memory_limit_bytes=8_000_000_000, speed_gflops=60.0),
)
"""The demo's classes, smallest first."""

METHOD_OPTIONS: Mapping[str, dict[str, JsonValue]] = {
    "hetlora": {"budget_exponent": 0.4},
    "flexlora": {"budget_exponent": 0.4},
    "fedra": {"capacity": "budget", "budget_exponent": 0.4},
}
"""Options of methods that share ranks or layers out by memory: in proportion to a power of the
budget, since in proportion to the budget itself all but the largest class would train the smallest
rank."""

RUN_NAME = "demo"
UNIFORM_RUN_NAME = "uniform"

CONCENTRATION = 0.3
"""Dirichlet parameter of the split by domain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """One demo."""

    model: Path
    """Hugging Face folder of the base model."""
    model_name: str
    """Name of the model for people."""
    folder: Path
    """Where everything goes."""
    method: str = "hetlora"
    rounds: int = 6
    seed: int = 0
    devices_per_class: int = 3
    local_steps: int = 8
    batch_size: int = 32
    max_length: int = 32
    max_rank: int = 16
    min_rank: int = 4
    learning_rate: float = 6e-3
    rows_per_intent: int = 0
    """Training rows of each intent that are dealt out; 0 for all 100."""
    head_start_examples: int = 500
    """Most examples a device looks at to start the head."""
    evaluate_rows: int = 1500
    """Rows of the test set for the measurement after each round; 0 for all 4,500."""
    with_baselines: bool = False
    baseline_seconds: float = 1800.0
    """Most time the centralised baseline may take."""
    is_quick: bool = False
    """Whether what takes long after the run is left out."""

    def __post_init__(self) -> None:
        for name in ("rounds", "devices_per_class", "local_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def devices(self) -> Mapping[str, DemoClass]:
        """Every device's class by the device's name, smallest class first."""
        return {
            f"{kind.name}-{number + 1}": kind
            for kind in CLASSES
            for number in range(self.devices_per_class)
        }


def run_config(
    demo: DemoConfig, *, model: Path, labels: tuple[str, ...], evaluation_data: Path
) -> RunConfig:
    """Settings of the demo's run, as an operator would write them in TOML.

    Args:
        demo: What the demo does.
        model: The model's folder under the name that reports shall show.
        labels: Class names.
        evaluation_data: Test rows.
    """
    return RunConfig(
        name=RUN_NAME,
        model=model.absolute(),
        method=demo.method,
        method_options=METHOD_OPTIONS.get(demo.method, {}),
        labels=labels,
        label_column="intent",
        rounds=demo.rounds,
        min_devices=len(demo.devices),
        deadline_seconds=600.0,
        local_steps=demo.local_steps,
        batch_size=demo.batch_size,
        max_length=demo.max_length,
        max_rank=demo.max_rank,
        min_rank=demo.min_rank,
        optimizer=OptimizerConfig(learning_rate=demo.learning_rate, schedule="linear"),
        seed=demo.seed,
        evaluation_data=evaluation_data.absolute(),
        evaluate_rows=demo.evaluate_rows,
        class_precisions={kind.name: kind.precisions for kind in CLASSES if kind.precisions},
        base_correction="none",
        head_start="class-means",
        head_start_options={"rule": "discriminant", "max_examples": demo.head_start_examples},
    )


def uniform_run_config(config: RunConfig) -> RunConfig:
    """The baseline without heterogeneity: FedIT with the smallest rank for everybody."""
    changes = {
        "name": UNIFORM_RUN_NAME,
        "method": "fedit",
        "method_options": {},
        "max_rank": config.min_rank,
    }
    return RunConfig.model_validate({**config.model_dump(), **changes})


def demo_config(
    *,
    model: Path,
    model_name: str,
    folder: Path,
    method: str,
    rounds: int | None,
    seed: int,
    with_baselines: bool,
    is_quick: bool,
) -> DemoConfig:
    """The demo as asked for; the short form trains less and measures on fewer rows."""
    common = DemoConfig(
        model=model,
        model_name=model_name,
        folder=folder,
        method=method,
        seed=seed,
        with_baselines=with_baselines,
    )
    if is_quick:
        return dataclasses.replace(
            common,
            rounds=rounds or 2,
            devices_per_class=1,
            local_steps=4,
            rows_per_intent=20,
            evaluate_rows=500,
            baseline_seconds=20.0,
            is_quick=True,
        )
    return dataclasses.replace(common, rounds=rounds or common.rounds)
