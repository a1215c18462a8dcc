# SPDX-License-Identifier: Apache-2.0
"""The command line: one command a file.

This module imports nothing outside the standard library, so that ``lorikit device`` works, and
stays small, where only ``lorikit[onnx]`` is installed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

_MISSING_PART = 10
"""``ExitCode.MISSING_PART``; its module may not be importable when this is needed."""

_ON_DEVICES = {("device",): "lorikit.sdk", ("doctor", "device"): "lorikit.sdk.doctor"}
"""Commands that need nothing of the server, and the programs that they are."""


def main() -> NoReturn:
    """Run the command that the process was started with; never returns."""
    arguments = sys.argv[1:]
    for words, module in _ON_DEVICES.items():
        if tuple(arguments[: len(words)]) == words:
            _become_device(module, arguments[len(words) :])
    try:
        app = importlib.import_module("lorikit.server.cli.app")
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "lorikit":
            raise
        print(missing_part_sentence(name), file=sys.stderr)
        sys.exit(_MISSING_PART)
    sys.exit(app.run(arguments))


def missing_part_sentence(module: str) -> str:
    """What to install when a module of the server part is not there."""
    return (
        f"lorikit: {module} is not installed; this command needs the server part: "
        'pip install "lorikit[server]"'
    )


def _become_device(module: str, arguments: Sequence[str]) -> NoReturn:
    """Turn this process into a program of the SDK, so that nothing of the server is in memory."""
    command = [sys.executable, "-m", module, *arguments]
    if os.name == "nt":  # execv on Windows gives the prompt back before the device ends
        sys.exit(subprocess.call(command))
    os.execv(sys.executable, command)
