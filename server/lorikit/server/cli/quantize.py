# SPDX-License-Identifier: Apache-2.0
"""``lorikit quantize``: a model folder in other precisions, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lorikit.server.cli.display import Format, FormatOption, print_json, print_table
from lorikit.server.cli.exit_codes import CommandError, ExitCode
from lorikit.server.convert import TARGETS, ConversionError, Report, convert

_SHORT = {"int4": "int4-row64"}
"""What a name without a layout stands for, in a base model."""


def quantize(
    folder: Annotated[Path, typer.Argument(help="Hugging Face model folder with safetensors.")],
    to: Annotated[
        list[str],
        typer.Option(help=f"Target codec, once per target: int4 or {', '.join(TARGETS)}."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for one converted folder per target; without it, only measure."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Pieces encoded at a time.")] = 2,
    output: FormatOption = Format.TEXT,
) -> None:
    """Convert a model folder to other precisions, tensor by tensor, and print sizes and errors.

    A conversion that was stopped goes on where it was. Models larger than memory convert, too.

    Example: lorikit quantize ./all-MiniLM-L6-v2 --to nf4 --to int4 --out ./converted
    """
    if not folder.is_dir():
        raise CommandError(ExitCode.NOT_FOUND, f"{folder} is not a folder; give a model folder")
    targets = list(dict.fromkeys(_SHORT.get(name, name) for name in to))
    try:
        with _progress(folder.name) as tell:
            reports = convert(folder, targets, out=out, threads=threads, progress=tell)
    except ConversionError as error:
        raise CommandError(ExitCode.MODEL, str(error)) from error
    if output is Format.JSON:
        print_json(_facts(folder, reports))
    else:
        _print(reports)


def _facts(folder: Path, reports: Sequence[Report]) -> dict[str, object]:
    return {
        "folder": str(folder),
        "targets": [
            {
                "codec": report.target,
                "folder": None if report.folder is None else str(report.folder),
                "seconds": report.seconds,
                "tensors_taken_up": report.taken_up,
                "source_bytes": sum(tensor.source_bytes for tensor in report.tensors),
                "bytes": sum(tensor.bytes for tensor in report.tensors),
                "classes": [
                    {
                        "class": kind,
                        "tensors": tensors,
                        "elements": elements,
                        "source_bytes": source,
                        "bytes": nbytes,
                        "relative_mse": _finite(errors.relative_mse),
                        "sqnr_db": _finite(errors.sqnr_db),
                        "max_abs_error": _finite(errors.max_abs_error),
                    }
                    for kind, (tensors, elements, source, nbytes, errors) in (
                        report.by_class().items()
                    )
                ],
            }
            for report in reports
        ],
    }


def _finite(value: float) -> float | None:
    """The number, or null where it is infinite, which JSON has no word for."""
    return value if math.isfinite(value) else None


def _print(reports: Sequence[Report]) -> None:
    rows = []
    for report in reports:
        for kind, (tensors, elements, source, nbytes, errors) in report.by_class().items():
            rows.append(
                (
                    report.target,
                    kind,
                    tensors,
                    f"{elements:,}",
                    f"{8 * nbytes / elements:.2f}" if elements else "-",
                    f"{source:,}",
                    f"{nbytes:,}",
                    f"{errors.relative_mse:.2e}",
                    f"{errors.sqnr_db:.1f}" if math.isfinite(errors.sqnr_db) else "exact",
                    f"{errors.max_abs_error:.2e}",
                )
            )
    columns = (
        "codec", "class", "tensors", "values", "bits", "bytes before", "bytes after",
        "relative MSE", "SQNR (dB)", "largest error",
    )  # fmt: skip
    print_table(columns, rows, title="Sizes and errors by class of tensor")
    for report in reports:
        if report.folder is not None:
            typer.echo(f"{report.target}: {report.folder} ({report.seconds:.1f} s)")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the error stream; silent where nobody watches."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"Converting {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
