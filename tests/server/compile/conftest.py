# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from lorikit.proto.manifest import Task
from lorikit.server.compile import Compiler
from lorikit.server.store.blobs import FolderBlobs

TASK = Task(kind="sequence-classification", labels=("a", "b", "c", "d", "e"))


@pytest.fixture(scope="session")
def compiler(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Compiles the tiny model with LoRA on every linear map of a layer."""
    return Compiler(
        tiny_model,
        TASK,
        targets=("query", "key", "value", "dense"),
        blobs=FolderBlobs(tmp_path_factory.mktemp("blobs")),
    )
