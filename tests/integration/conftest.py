# SPDX-License-Identifier: Apache-2.0
"""Settings of small runs on the small model, its packages, and what a calm run comes to."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.compiled_server import leave_parts
from tests.integration.outcomes import Outcome, assert_counted_once, outcome
from tests.integration.processes import (
    LABELS,
    Server,
    example_rows,
    make_devices,
    write_rows,
)

from lorikit.proto.manifest import Task
from lorikit.proto.plan import OptimizerConfig
from lorikit.server.config import RunConfig
from lorikit.server.store.blobs import FolderBlobs

TARGETS = ("query", "key", "value", "dense")

RunSettings = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def run_settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """Settings of a run of two short rounds, with changes by name."""
    rows = write_rows(tmp_path_factory.mktemp("rows") / "test.jsonl", example_rows(60, seed=99))

    def settings(**changes: Any) -> RunConfig:
        fields: dict[str, Any] = {
            "name": "test",
            "model": tiny_model,
            "labels": LABELS,
            "rounds": 2,
            "min_devices": 3,
            "min_updates": 2,
            "deadline_seconds": 600.0,
            "local_steps": 4,
            "batch_size": 8,
            "max_length": 16,
            "max_rank": 8,
            "targets": TARGETS,
            "optimizer": OptimizerConfig(learning_rate=0.01),
            "evaluation_data": rows,
            "seed": 7,
        }
        return RunConfig(**{**fields, **changes})

    return settings


@pytest.fixture(scope="session")
def compiler(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiler of the small model, in this process."""
    pytest.importorskip("torch", reason="the compiler exports with torch")
    compiling = importlib.import_module("lorikit.server.compile.compiler")
    return compiling.Compiler(
        tiny_model,
        Task(kind="sequence-classification", labels=LABELS),
        targets=TARGETS,
        blobs=FolderBlobs(tmp_path_factory.mktemp("compiled") / "blobs"),
    )


@pytest.fixture(scope="session")
def compiled(compiler: Any, survival: RunConfig) -> Path:
    """Folder of the survival run's packages, for servers that start often."""
    folder = compiler.blobs.folder.parent
    leave_parts(folder, compiler, survival)
    return folder


@pytest.fixture(scope="session")
def survival(run_settings: RunSettings) -> RunConfig:
    """A run whose adapter takes several chunks, and whose tasks last over several journal saves."""
    return run_settings(
        name="survival",
        max_rank=768,
        local_steps=25,
        min_updates=3,
        learning_rate_factors={"lora_B": 2.0},
    )


@pytest.fixture(scope="session")
def undisturbed(
    survival: RunConfig, compiled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What the survival run comes to when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with contextlib.ExitStack() as running:
        server = running.enter_context(Server(folder / "server", compiled=compiled).start())
        server.create(survival)
        devices = make_devices(folder, server.address)
        for device in devices:
            running.enter_context(device.start())
        assert server.ended(survival.name).state == "finished"
        assert [device.process.wait() for device in devices] == [0, 0, 0]
        assert_counted_once(server, survival.name, devices, survival.rounds)
        return outcome(server, survival.name)
