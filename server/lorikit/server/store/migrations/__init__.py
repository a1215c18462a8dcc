# SPDX-License-Identifier: Apache-2.0
"""Steps from each version of the tables to the next; ``upgrade`` takes those that are lacking.

The numbers of the files in ``versions`` are those of ``tables.SCHEMA_VERSION``.
"""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


def upgrade(connection: Connection, found: int) -> int:
    """Bring the tables from version ``found`` (0: there are none) to the newest; its number.

    All steps are part of the connection's transaction: a crash leaves the tables as they were.
    """
    config = Config()
    config.set_main_option("path_separator", "newline")
    config.set_main_option("script_location", str(Path(__file__).parent))
    script = ScriptDirectory.from_config(config)
    newest = script.get_current_head()
    steps = [r for r in script.walk_revisions() if int(r.revision) > found]
    with Operations.context(MigrationContext.configure(connection)):
        for step in reversed(steps):
            step.module.upgrade()
    return int(newest or 0)
