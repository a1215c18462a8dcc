# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorikit.server import cli


def lorikit(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; {before}\nfrom lorikit.server.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_device_command_becomes_the_device_runner_before_anything_heavy_is_loaded():
    spy = (
        "import os\n"
        "def spy(path, command):\n"
        "    heavy = {'typer', 'rich', 'torch', 'grpc', 'numpy'} & set(sys.modules)\n"
        "    print(command[1:], sorted(heavy)); sys.exit(0)\n"
        "os.execv = spy"
    )

    done = lorikit("device", "--server", "localhost:1", before=spy)

    assert done.stdout.strip() == "['-m', 'lorikit.sdk', '--server', 'localhost:1'] []"


@pytest.mark.skipif(os.name == "nt", reason="execv replaces the process on POSIX only")
def test_device_help_is_that_of_the_device_runner():
    done = lorikit("device", "--help")

    assert done.returncode == 0
    assert "--memory-limit" in done.stdout


@pytest.mark.parametrize("module", ["typer", "rich", "pydantic"])
def test_missing_server_part_is_one_line_with_the_install_command(module):
    done = lorikit("version", before=f"sys.modules[{module!r}] = None")

    assert done.returncode == 10
    assert done.stderr.strip().splitlines() == [cli.missing_part_sentence(module)]
    assert 'pip install "lorikit[server]"' in done.stderr
