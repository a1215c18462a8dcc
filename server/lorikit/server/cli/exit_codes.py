# SPDX-License-Identifier: Apache-2.0
"""Exit codes, and which error leads to which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from lorikit.proto.status import ErrorCode


class ExitCode(IntEnum):
    """How a command ended; scripts may rely on the numbers."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 3
    MODEL = 4
    DOES_NOT_FIT = 5
    UNREACHABLE = 6
    REFUSED = 7
    NOT_FOUND = 8
    RUN_FAILED = 9
    MISSING_PART = 10
    STORAGE = 11
    UNHEALTHY = 12
    INTERRUPTED = 130


MEANINGS: Mapping[ExitCode, str] = {
    ExitCode.OK: "The command did what it was asked.",
    ExitCode.INTERNAL: "A fault in Lorikit; run again with `lorikit --debug ...` and report it.",
    ExitCode.USAGE: "An option or argument is missing, unknown or out of range.",
    ExitCode.CONFIG: "A setting of a run, a server or a device class is not valid.",
    ExitCode.MODEL: "The model cannot be compiled, or its graph disagrees with torch.",
    ExitCode.DOES_NOT_FIT: "No plan fits the memory of a device that must take part.",
    ExitCode.UNREACHABLE: "The server does not answer, or not in time.",
    ExitCode.REFUSED: "The server answered, and refused.",
    ExitCode.NOT_FOUND: "No run, adapter, file or folder has that name.",
    ExitCode.RUN_FAILED: "The run failed or was stopped before its last round.",
    ExitCode.MISSING_PART: "An optional part is not installed; the message has the command.",
    ExitCode.STORAGE: "A file or folder could not be read or written.",
    ExitCode.UNHEALTHY: "`lorikit doctor` found a problem.",
    ExitCode.INTERRUPTED: "Stopped by Ctrl-C.",
}
"""What each code means; ``docs/cli.md`` shows this table."""

OF_REFUSAL: Mapping[ErrorCode, ExitCode] = {
    ErrorCode.CONFIG_INVALID: ExitCode.CONFIG,
    ErrorCode.RUN_UNKNOWN: ExitCode.NOT_FOUND,
    ErrorCode.ADAPTER_UNKNOWN: ExitCode.NOT_FOUND,
    ErrorCode.BLOB_UNKNOWN: ExitCode.NOT_FOUND,
    ErrorCode.STORAGE_FULL: ExitCode.STORAGE,
    ErrorCode.INTERNAL: ExitCode.INTERNAL,
}
"""Codes of the wire with an exit code of their own; all others are ``REFUSED``."""


class CommandError(Exception):
    """A command cannot go on; the message is one sentence with value and remedy."""

    def __init__(self, code: ExitCode, message: str) -> None:
        """Args are the exit code and the sentence."""
        super().__init__(message)
        self.code = code


def markdown_table() -> str:
    """The table of exit codes as ``docs/cli.md`` has it."""
    rows = [f"| {code.value} | {code.name} | {MEANINGS[code]} |" for code in ExitCode]
    return "\n".join(["| code | name | meaning |", "| --- | --- | --- |", *rows])
