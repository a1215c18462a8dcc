# SPDX-License-Identifier: Apache-2.0
"""Rehearses the plan of a device class: a real device process, real steps, its real limit.

The process is the SDK's own (``lorikit.sdk._rehearsal``); nothing of the server is in it. It trains
on rows of words drawn from the model's vocabulary, or on noise where the model reads images.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorikit.proto.manifest import Manifest
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.cli.profile_plans import ClassPlan, Measured, Work

if TYPE_CHECKING:
    from lorikit.server.compile import Compiler

_MEMORY_EXIT_CODE = 10
"""Of a device process that exceeded its limit; see ``lorikit device --help``."""

_SHORTEST_WORD = 2


def rehearsed(
    compiler: Compiler, entry: ClassPlan, work: Work, *, folder: Path, steps: int = 3
) -> ClassPlan:
    """The plan with what a device process that carries it out really took.

    Args:
        compiler: Makes the package, into the folder ``folder``.
        entry: What to rehearse.
        work: The optimiser step.
        folder: The compiler's blob folder; rows and settings are written beside the blobs.
        steps: Optimiser steps to train.

    Raises:
        CommandError: The process failed, or did not keep to the class's limit.
    """
    settings = rehearsal(compiler, entry, work, folder=folder, steps=steps)
    return dataclasses.replace(
        entry, measured=measure(settings, folder / "rehearsal.json", entry.device_class.name)
    )


def rehearsal(
    compiler: Compiler, entry: ClassPlan, work: Work, *, folder: Path, steps: int = 3
) -> Mapping[str, object]:
    """What a device process needs to know to carry out a plan; see ``rehearsed``."""
    choice = entry.choice
    package = compiler.package(
        precision=choice.precision,
        lowest_trained_layer=entry.lowest_trained_layer,
        kept_layers=entry.kept_layers,
        runtime=choice.runtime,
        recomputed_layers=choice.recomputed_layers,
        kernels=choice.kernels,
    )
    return {
        "folder": str(folder),
        "manifest": package.ref.digest,
        "rows": _write_rows(package.manifest, folder, work, steps),
        "rank": entry.rank,
        "batch_size": work.batch_size,
        "micro_batch": choice.micro_batch,
        "length": work.length,
        "steps": steps,
        "threads": max(1, min(entry.device_class.cores, os.cpu_count() or 1)),
        "memory_limit": entry.device_class.memory_limit_bytes,
    }


def measure(settings: Mapping[str, object], path: Path, name: str) -> Measured:
    """Carry out a plan in a process of its own.

    Args:
        settings: From ``rehearsal``.
        path: Where they are written for the process.
        name: Class of the device, for messages.

    Raises:
        CommandError: The process failed, or did not keep to the class's limit.
    """
    path.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "lorikit.sdk._rehearsal", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == _MEMORY_EXIT_CODE:
        raise CommandError(
            ExitCode.DOES_NOT_FIT,
            f"class {name}: the plan did not keep to its limit: {_last_line(done.stderr)}",
        )
    if done.returncode != 0:
        raise CommandError(
            ExitCode.INTERNAL, f"class {name}: the rehearsal failed: {_last_line(done.stderr)}"
        )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return Measured(
        peak_bytes=int(figures["peak_memory_bytes"]),
        anonymous_bytes=int(figures["anonymous_memory_bytes"]),
        seconds_per_step=figures["seconds_per_step"],
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _write_rows(manifest: Manifest, folder: Path, work: Work, steps: int) -> str:
    """Path of a file of rows that are as long as the longest example; empty for images."""
    if manifest.tokenizer is None:
        return ""
    words = _words(json.loads((folder / manifest.tokenizer.digest).read_bytes()))
    path = folder / "rehearsal.jsonl"
    rows = (json.dumps(row) for row in _rows(manifest, words, work, steps))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def _rows(
    manifest: Manifest, words: list[str], work: Work, steps: int
) -> Iterator[Mapping[str, str | int | list[str] | list[int]]]:
    """As many rows as the steps read, with words from all over the table of words.

    A long task reads all of the table sooner or later; a few steps come near that only with words
    that lie evenly apart.
    """
    task, count = manifest.task, work.batch_size * steps
    places = np.linspace(0, len(words) - 1, count * work.length).astype(np.int64)
    for index, row in enumerate(np.random.default_rng(0).permutation(places).reshape(count, -1)):
        chosen = [words[place] for place in row]
        if task.kind == "token-classification":
            labels = [place % len(task.labels) for place in range(len(chosen))]
            yield {task.text_column: chosen, task.label_column: labels}
        elif task.labels:
            label = index % len(task.labels)
            yield {task.text_column: " ".join(chosen), task.label_column: label}
        else:
            yield {task.text_column: " ".join(chosen)}


def _words(tokenizer: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Whole words of a tokeniser's vocabulary by their number, or letters where it has none."""
    vocabulary = tokenizer["model"].get("vocab", {})
    entries = (
        sorted(vocabulary, key=vocabulary.__getitem__)
        if isinstance(vocabulary, dict)
        else [row[0] for row in _list(vocabulary)]
    )
    cleaned = (str(entry).lstrip("Ġ▁ ") for entry in entries)
    words = dict.fromkeys(w for w in cleaned if len(w) >= _SHORTEST_WORD and w.isalnum())
    return [*words] or ["a", "b", "c"]


def _list(value: object) -> list[list[object]]:
    assert isinstance(value, list)
    return value
