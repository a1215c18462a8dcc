# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from lorikit.server.failpoints import Failpoint

PROGRAM = """
import sys
from lorikit.server.failpoints import Failpoint
reach = Failpoint(sys.argv[1])
for name in ("round.training", "round.closed", "round.training"):
    print(name, flush=True)
    reach(name)
"""


@pytest.mark.parametrize(("setting", "lines"), [("round.training", 1), ("round.training:2", 3)])
def test_process_dies_at_the_point(setting, lines):
    done = subprocess.run([sys.executable, "-c", PROGRAM, setting], capture_output=True)

    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.splitlines()) == lines


@pytest.mark.parametrize("setting", ["", "round.training:3", "round.assigning"])
def test_process_lives_where_the_point_is_not_reached(setting):
    done = subprocess.run([sys.executable, "-c", PROGRAM, setting], capture_output=True)

    assert (done.returncode, len(done.stdout.splitlines())) == (0, 3)


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_count_must_be_a_positive_number(count):
    with pytest.raises(ValueError, match="NAME:COUNT"):
        Failpoint(f"round.training:{count}")
