# SPDX-License-Identifier: Apache-2.0
"""A database of the store's tables: opening it, its transactions, and events.

SQLite runs in WAL mode with every commit flushed to the disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, inspect, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from lorikit.server.errors import LorikitError
from lorikit.server.store.migrations import upgrade
from lorikit.server.store.tables import SCHEMA_VERSION, EventRow, MetaRow


class StoreError(LorikitError):
    """The database cannot be used; the message says why and what to do."""


class Database:
    """An opened database; safe for several threads."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database, and bring its tables to this version where they are older.

        Args:
            url: SQLAlchemy URL.
            clock: Seconds since the epoch, for the times in the tables.

        Raises:
            StoreError: The tables are of a newer version, or hold none.
        """
        self._clock = clock
        self._engine = _engine(url)
        self._begin = sessionmaker(self._engine, expire_on_commit=False).begin
        self._open()

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _open(self) -> None:
        with self._begin() as session:
            connection = session.connection()
            is_new = not inspect(connection).has_table(MetaRow.__tablename__)
            row = None if is_new else session.get(MetaRow, "schema_version")
            found = "0" if is_new else row.value if row else "none"
            if not (found.isdecimal() and int(found) <= SCHEMA_VERSION):
                raise StoreError(
                    f"database has tables of version {found}, this server reads up to "
                    f"{SCHEMA_VERSION}; start the server version that wrote it, or give another "
                    "database"
                )
            if int(found) < SCHEMA_VERSION:
                reached = upgrade(connection, int(found))
                session.merge(MetaRow(name="schema_version", value=str(reached)))

    def _tell(self, session: Session, run_id: str, kind: str, **facts: object) -> None:
        last = session.scalar(select(func.max(EventRow.sequence)).where(EventRow.run_id == run_id))
        session.add(
            EventRow(
                run_id=run_id,
                sequence=(last or 0) + 1,
                time=self._clock(),
                kind=kind,
                facts=document(facts),
            )
        )
        session.flush()


def document(facts: Mapping[str, Any]) -> str:
    """JSON text of facts, the same for equal facts."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def _engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(_BEGIN))
    return engine


_BEGIN = "BEGIN IMMEDIATE"
"""Take the write lock at the start, so that no transaction fails half-way for want of it."""


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the "begin" event below starts transactions
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
