# SPDX-License-Identifier: Apache-2.0
"""A device as a process of its own: ``python -m lorikit.sdk``."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path

from lorikit.sdk import (
    Client,
    ConnectionLostError,
    DataError,
    EngineUnavailableError,
    Event,
    IdentityError,
    LorikitError,
    MemoryUse,
    MemoryWatch,
    OutOfMemoryError,
    ProtocolVersionError,
    RefusedError,
    State,
    StoreBusyError,
    limit_memory,
    parse_bytes,
)
from lorikit.sdk._memory import lacks_memory, small_stacks


class ExitCode(IntEnum):
    """How the process ends."""

    FINISHED = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    CONNECTION = 4
    PROTOCOL = 5
    IDENTITY = 6
    ENGINE = 7
    DATA = 8
    STORE_BUSY = 9
    MEMORY = 10
    STOPPED = 143


_EXIT_CODES: Sequence[tuple[type[Exception], ExitCode]] = (
    (RefusedError, ExitCode.REFUSED),
    (ConnectionLostError, ExitCode.CONNECTION),
    (ProtocolVersionError, ExitCode.PROTOCOL),
    (IdentityError, ExitCode.IDENTITY),
    (EngineUnavailableError, ExitCode.ENGINE),
    (DataError, ExitCode.DATA),
    (StoreBusyError, ExitCode.STORE_BUSY),
    (OutOfMemoryError, ExitCode.MEMORY),
)

_TOKEN_VARIABLE = "LORIKIT_ENROLMENT_TOKEN"

_EPILOG = """\
exit codes:
  0 run finished, or --max-rounds reached   6 not enrolled
  1 any other error                         7 engine not installed
  2 wrong arguments                         8 data cannot be read
  3 device does not fit                     9 store in use by another process
  4 server out of reach                    10 memory limit exceeded
  5 update needed                         143 stopped by SIGTERM or SIGINT

example:
  python -m lorikit.sdk --server localhost:50051 --insecure --data rows.jsonl --store ./device
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a device; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.memory_limit is not None and arguments is None:
        _start_lean()
    logging.basicConfig(level=options.log_level, stream=sys.stderr)
    show = _Printer(options.format)
    try:
        if options.memory_limit is not None:
            limit_memory(options.memory_limit)
        rows = list(_rows(options.data))
        with _watch(options.memory_limit):
            return _run(options, rows, show)
    except Exception as error:
        if not isinstance(error, LorikitError) and not lacks_memory(error):
            raise
        show.error(error)
        if lacks_memory(error):
            return ExitCode.MEMORY
        codes = (code for kind, code in _EXIT_CODES if isinstance(error, kind))
        return next(codes, ExitCode.FAILED)


def _run(options: argparse.Namespace, rows: list[Mapping[str, object]], show: _Printer) -> int:
    """Take part until the run is finished or a signal comes."""
    certificates = options.root_certificates
    with Client(
        options.server,
        rows,
        store=options.store,
        memory_limit=options.memory_limit,
        device_class=options.device_class,
        engine=options.engine,
        threads=options.threads,
        insecure=options.insecure,
        root_certificates=None if certificates is None else certificates.read_bytes(),
        enrolment_token=options.enrolment_token or os.environ.get(_TOKEN_VARIABLE, ""),
        enrol_server=options.enrol_server,
        speed_gflops=options.speed_gflops,
        on_event=show.event,
    ) as client:
        client.start(max_rounds=options.max_rounds)
        stopped = _Signals()
        while client.wait(0.2) not in (State.FINISHED, State.STOPPED, State.FAILED):
            if stopped.received:
                client.stop()
        client.wait()
        return ExitCode.STOPPED if stopped.received else ExitCode.FINISHED


class _Signals:
    """Remembers that SIGTERM or SIGINT came; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)


class _Printer:
    """Prints events as text for people or as JSON lines for programs."""

    def __init__(self, kind: str) -> None:
        self._as_json = kind == "json"

    def event(self, event: Event) -> None:
        facts = {"event": type(event).__name__, **dataclasses.asdict(event)}
        self._print(facts)

    def error(self, error: Exception) -> None:
        self._print({"event": "Error", "error": type(error).__name__, "message": str(error)})

    def _print(self, facts: Mapping[str, object]) -> None:
        if self._as_json:
            print(json.dumps(facts, sort_keys=True), flush=True)
            return
        words = (f"{name}={value}" for name, value in facts.items() if name != "event")
        print(f"{facts['event']}: {' '.join(words)}", flush=True)


def _rows(path: Path) -> Iterator[Mapping[str, object]]:
    """Rows of a JSON-lines file, also a compressed one.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object; names the line.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path} line {number} is not a JSON object")
                yield row
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{path} line {number} is not JSON: {error}") from error


def _start_lean() -> None:
    """Start this program anew with small stacks, one BLAS thread and one heap.

    All three are read when a process starts. The first two reserve tens of megabytes that would
    count against the limit without ever being used; a heap per thread keeps what was freed in it
    (3 to 5 MB more at the peak of a MiniLM step).
    """
    if not small_stacks():
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.execv(sys.executable, sys.orig_argv)


def _watch(limit_bytes: int | None) -> MemoryWatch:
    return MemoryWatch(limit_bytes=limit_bytes, on_exceeded=_end_for_memory)


def _end_for_memory(use: MemoryUse) -> None:
    print(
        f"memory limit exceeded: {use.resident_bytes} bytes resident, "
        f"{use.anonymous_bytes} of them anonymous",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ExitCode.MEMORY)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lorikit.sdk",
        description="Take part in federated fine-tuning with the rows of a file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--server", required=True, metavar="HOST:PORT")
    add("--data", required=True, type=Path, help="JSON lines, plain or .gz; never leaves here")
    add("--store", required=True, type=Path, help="folder for the device's state")
    add("--memory-limit", type=_size, help="enforced on this process, for example 256MB")
    add("--device-class", default="", help="name of this kind of device in reports")
    add("--engine", help="onnx or onnx-training; the best installed one if left out")
    add("--threads", type=_count, help="threads for training; all cores if left out")
    add("--speed-gflops", type=float, help="tell this speed instead of measuring it")
    add("--max-rounds", type=_count, help="stop after so many rounds of this device")
    add("--insecure", action="store_true", help="no encryption; for tests and loopback")
    add("--root-certificates", type=Path, help="PEM of the authorities to trust")
    add(
        "--enrolment-token",
        default="",
        help=f"one-time token of the operator; better given as {_TOKEN_VARIABLE}, which other "
        "users of the machine cannot see",
    )
    add(
        "--enrol-server", metavar="HOST:PORT", help="where devices enrol; the next port if left out"
    )
    add("--format", choices=("text", "json"), default="text", help="how events are printed")
    add("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
