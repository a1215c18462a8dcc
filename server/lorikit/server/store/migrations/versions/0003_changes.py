# SPDX-License-Identifier: Apache-2.0
"""Tasks whose adapter comes as a change against one that the device holds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; earlier tasks have no change."""
    op.add_column("tasks", sa.Column("change", sa.String(), nullable=False, server_default=""))
