# SPDX-License-Identifier: Apache-2.0
"""A database of an earlier version opens, with everything that was in it."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from lorikit.server.store import database
from lorikit.server.store.identity import AuditLine
from lorikit.server.store.migrations import upgrade
from lorikit.server.store.sql import SqlStore
from lorikit.server.store.tables import SCHEMA_VERSION, Table

FIRST_VERSION = """
CREATE TABLE meta (name VARCHAR NOT NULL, value VARCHAR NOT NULL, PRIMARY KEY (name));
CREATE TABLE runs (
    id VARCHAR NOT NULL, name VARCHAR NOT NULL, config VARCHAR NOT NULL, created FLOAT NOT NULL,
    state VARCHAR(16) NOT NULL, message VARCHAR NOT NULL, stop VARCHAR NOT NULL,
    initial_digest VARCHAR, ended FLOAT, PRIMARY KEY (id), UNIQUE (name));
CREATE TABLE devices (
    id VARCHAR NOT NULL, installation_id VARCHAR NOT NULL, token_hash VARCHAR NOT NULL,
    profile VARCHAR NOT NULL, enrolled FLOAT NOT NULL, PRIMARY KEY (id), UNIQUE (installation_id));
CREATE TABLE tasks (
    id VARCHAR NOT NULL, run_id VARCHAR NOT NULL, adapter_digest VARCHAR NOT NULL,
    PRIMARY KEY (id));
INSERT INTO meta VALUES ('schema_version', '1');
INSERT INTO runs VALUES ('r', 'demo', '{}', 1.0, 'running', '', '', NULL, NULL);
INSERT INTO devices VALUES ('d1', 'installation of d1', 'h', '{}', 1.0);
"""
"""Part of what Lorikit 0.1.0 wrote: the tables that this test looks at, or that a step changes."""


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'test.sqlite'}"


def execute(url, script):
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in filter(str.strip, script.split(";\n")):
            connection.execute(text(statement))
    engine.dispose()


def versions(url):
    engine = create_engine(url)
    with engine.begin() as connection:
        found = connection.execute(text("SELECT value FROM meta")).scalars().all()
    engine.dispose()
    return found


def test_database_of_the_first_version_opens_and_is_brought_up_to_date(url):
    execute(url, FIRST_VERSION)

    store = SqlStore(url)
    assert store.run("demo").state == "running"
    assert store.device("d1").installation_id == "installation of d1"
    store.append_audit([AuditLine(actor="local", action="test")])
    store.close()
    assert versions(url) == [str(SCHEMA_VERSION)]
    again = SqlStore(url)
    assert [row.action for row in again.audit()] == ["test"]
    again.close()


def test_steps_lead_to_the_tables_of_the_code(url):
    engine = create_engine(url)
    with engine.begin() as connection:
        assert upgrade(connection, 0) == SCHEMA_VERSION
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    engine.dispose()


def test_crash_half_way_leaves_the_old_version(url, monkeypatch):
    execute(url, FIRST_VERSION)

    def crash(connection, found):
        upgrade(connection, found)
        raise RuntimeError("the power failed")

    monkeypatch.setattr(database, "upgrade", crash)
    with pytest.raises(RuntimeError, match="the power failed"):
        SqlStore(url)
    assert versions(url) == ["1"]
    monkeypatch.undo()
    SqlStore(url).close()
    assert versions(url) == [str(SCHEMA_VERSION)]


@pytest.mark.parametrize("change", ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"])
def test_database_refuses_to_change_the_audit_log(url, change):
    store = SqlStore(url)
    store.append_audit([AuditLine(actor="local", action="test")])
    engine = create_engine(url)
    with (
        pytest.raises(IntegrityError, match="append-only"),
        engine.begin() as connection,
    ):
        connection.execute(text(change))
    engine.dispose()

    assert [row.actor for row in store.audit()] == ["local"]
    store.close()
