# SPDX-License-Identifier: Apache-2.0
"""A few training steps in a process of their own: what a plan really takes.

``python -m lorikit.sdk._rehearsal SETTINGS.json`` opens a package, trains on the rows of a file
as a task would (executor, optimiser and journal included) under a memory limit, and prints one JSON
object: ``peak_memory_bytes``, ``anonymous_memory_bytes``, ``baseline_bytes`` (before the engine),
``seconds_per_step``. Where the limit does not hold it exits with code 10, as ``lorikit device``
does.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorikit.proto.manifest import Manifest, load
from lorikit.proto.plan import OptimizerConfig, Phase, Plan
from lorikit.proto.tensors import Tensors
from lorikit.sdk import MemoryUse, MemoryWatch, limit_memory, memory_use
from lorikit.sdk._data import Dataset, read_dataset
from lorikit.sdk._events import Event, Progress
from lorikit.sdk._memory import lacks_memory, small_stacks
from lorikit.sdk._pages import release_file_pages
from lorikit.sdk._plan import PlanExecutor
from lorikit.sdk._store import Journal
from lorikit.sdk.engines import open_engine

MEMORY_EXIT_CODE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to rehearse."""

    folder: str
    """Flat folder with the package's blobs."""
    manifest: str
    """Digest of the manifest, which lies in the same folder."""
    rows: str
    """File of rows, one JSON object a line; empty for images of noise."""
    rank: int
    batch_size: int
    micro_batch: int
    length: int
    steps: int
    threads: int
    memory_limit: int = 0
    """Bytes the process may hold resident; 0 for no limit."""


def rehearse(settings: Settings) -> dict[str, float]:
    """Train for some steps and measure; call it in a process that does nothing else."""
    folder = Path(settings.folder)
    manifest = load((folder / settings.manifest).read_bytes())
    data = _data(settings, manifest, folder)
    release_file_pages()
    baseline = memory_use().resident_bytes
    engine = open_engine(None, manifest, folder, threads=settings.threads)
    ends: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Progress):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as journal, MemoryWatch() as watch:
        executor = PlanExecutor(
            engine,
            manifest,
            data,
            journal=Journal(Path(journal)),
            emit=note,
            cancelled=lambda: False,
        )
        executor.run(_plan(settings, manifest), _adapter(settings, manifest), "rehearsal")
    times = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "peak_memory_bytes": memory_use().peak_resident_bytes,
        "anonymous_memory_bytes": watch.peak_anonymous_bytes,
        "baseline_bytes": baseline,
        "seconds_per_step": statistics.median(times) if times else 0.0,
    }


def _data(settings: Settings, manifest: Manifest, folder: Path) -> Dataset:
    tokenizer = manifest.tokenizer and (folder / manifest.tokenizer.digest).read_bytes()
    return read_dataset(_rows(settings, manifest), manifest, tokenizer or None, settings.length)


def _rows(settings: Settings, manifest: Manifest) -> list[Mapping[str, object]]:
    if settings.rows:
        lines = Path(settings.rows).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    image = manifest.image
    assert image is not None
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)
    task = manifest.task
    return [
        {task.image_column: pixels, task.label_column: index % len(task.labels)}
        for index in range(settings.batch_size)
    ]


def _plan(settings: Settings, manifest: Manifest) -> Plan:
    phase = Phase(
        train=tuple(tensor.name for tensor in manifest.adapter if tensor.trained),
        steps=settings.steps,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        optimizer=OptimizerConfig(),
    )
    return Plan(
        method="rehearsal",
        inputs={"lora_scale": 2.0},
        phases=(phase,),
        send=phase.train,
        max_length=settings.length,
    )


def _adapter(settings: Settings, manifest: Manifest) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {
        tensor.name: [settings.rank if n == "rank" else int(n) for n in tensor.shape]
        for tensor in manifest.adapter
    }
    return {n: rng.normal(0, 0.02, shape).astype(np.float32) for n, shape in shapes.items()}


def _end_for_memory(use: MemoryUse) -> None:
    print(f"memory limit exceeded: {use.resident_bytes} bytes resident", file=sys.stderr)
    os._exit(MEMORY_EXIT_CODE)


def main(path: str) -> int:
    """Rehearse what a file of settings says; returns the exit code."""
    if small_stacks():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        os.execv(sys.executable, sys.orig_argv)
    settings = Settings(**json.loads(Path(path).read_text(encoding="utf-8")))
    limit = settings.memory_limit or None
    try:
        if limit is not None:
            limit_memory(limit)
        with MemoryWatch(limit_bytes=limit, on_exceeded=_end_for_memory):
            print(json.dumps(rehearse(settings)))
    except Exception as error:
        if not lacks_memory(error):
            raise
        print(f"no memory: {error}", file=sys.stderr)
        return MEMORY_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
