"""A migration beside which older code goes on changes nothing that this code uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.states import RunState
from batch_system.database.alembic_history import script_directory
from batch_system.database.engine import Database
from batch_system.database.histories import DATA_HISTORY
from batch_system.database.migrate import oldest_of
from tests.migrations import add_migration
from tests.upgrade.expansions import facts_of, problems, refused

NEWEST, DATA_NEWEST = LEDGER_HISTORY.revisions[-1], DATA_HISTORY.revisions[-1]

STATES = {
    "ledger_0027": "waiting queued running retrying interrupted succeeded failed cancelled skipped"
}
"""The states of runs that code knows, from this migration of the ledger on. A new one needs a
migration that contracts, or a gate.
"""


async def test_all_migrations_are_what_they_say_they_are(database_url: str) -> None:
    database = Database(database_url, setting="LEDGER_URL", pooled=False)
    assert await problems(database, LEDGER_HISTORY, DATA_HISTORY) == []
    await database.dispose()


def test_there_is_no_state_that_code_beside_this_one_does_not_know() -> None:
    scripts = script_directory(LEDGER_HISTORY.folder)
    oldest = oldest_of(scripts.get_revision(NEWEST).module)
    known = [states for revision, states in sorted(STATES.items()) if revision <= oldest]
    assert set(RunState) == set(known[-1].split())


@pytest.mark.parametrize(
    "sql",
    [
        "ALTER TABLE batch_runs ADD COLUMN later integer",
        "ALTER TABLE batch_runs ADD COLUMN later integer NOT NULL DEFAULT 0",
        "CREATE TABLE batch_later (id integer PRIMARY KEY, name text NOT NULL UNIQUE)",
        "CREATE INDEX ix_batch_later ON batch_runs (reason) WHERE reason IS NOT NULL",
        "UPDATE batch_tasks SET description = ''",
    ],
)
async def test_an_expansion_adds_what_older_code_need_not_know(ledger: Database, sql: str) -> None:
    assert await said_of(ledger, sql) == []


@pytest.mark.parametrize(
    ("sql", "what"),
    [
        ("ALTER TABLE batch_runs DROP COLUMN message", "drops column message of batch_runs"),
        (
            "ALTER TABLE batch_nodes RENAME COLUMN host TO machine",
            "drops column host of batch_nodes",
        ),
        ("DROP TABLE batch_pruned", "drops the table batch_pruned"),
        ("ALTER TABLE batch_pruned RENAME TO batch_gone", "drops the table batch_pruned"),
        ("DROP INDEX ix_batch_runs_parent", "drops index ix_batch_runs_parent of batch_runs"),
        (
            "DROP INDEX uq_batch_runs_exclusive; CREATE UNIQUE INDEX uq_batch_runs_exclusive "
            "ON batch_runs (exclusive, lane) WHERE state = 'running'",
            "changes index uq_batch_runs_exclusive of batch_runs",
        ),
        (
            "CREATE UNIQUE INDEX uq_batch_later ON batch_runs (slot)",
            "adds index uq_batch_later to batch_runs: it is unique",
        ),
        (
            "ALTER TABLE batch_pruned ADD COLUMN later integer CHECK (later > 0)",
            "older code may not satisfy it",
        ),
    ],
)
async def test_it_takes_nothing_away_and_demands_nothing(
    ledger: Database, sql: str, what: str
) -> None:
    assert what in " ".join(await said_of(ledger, sql))


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    ("sql", "what"),
    [
        (
            "ALTER TABLE batch_pruned ADD COLUMN later integer NOT NULL",
            "it is NOT NULL and has no default",
        ),
        ("ALTER TABLE batch_runs ALTER reason SET NOT NULL", "changes column reason"),
        ("ALTER TABLE batch_runs ALTER reason TYPE varchar(10)", "changes column reason"),
        ("ALTER TABLE batch_runs ALTER priority DROP DEFAULT", "changes column priority"),
        ("ALTER TABLE batch_runs ADD CHECK (priority > 0)", "adds check"),
        ("ALTER TABLE batch_runs ADD UNIQUE (id, task)", "adds unique constraint"),
    ],
)
async def test_it_makes_no_column_stricter(ledger: Database, sql: str, what: str) -> None:
    """SQLite can't change columns."""
    assert what in " ".join(await said_of(ledger, sql))


async def said_of(ledger: Database, sql: str) -> list[str]:
    before = await facts_of(ledger)
    async with ledger.engine.begin() as connection:
        for statement in sql.split(";"):
            await connection.execute(text(statement))
    return refused(before, await facts_of(ledger))


async def test_a_migration_says_from_which_revision_on_code_may_go_on(
    database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    database = Database(database_url, setting="LEDGER_URL", pooled=False)
    dropped = "ALTER TABLE batch_runs DROP COLUMN message"
    first = add_migration(monkeypatch, tmp_path / "1", LEDGER_HISTORY, dropped, NEWEST)
    second = add_migration(monkeypatch, tmp_path / "2", LEDGER_HISTORY, oldest="ledger_9999")
    data = add_migration(monkeypatch, tmp_path / "3", DATA_HISTORY)
    assert await problems(database, LEDGER_HISTORY, DATA_HISTORY) == [
        f"{first}: drops column message of batch_runs",
        f"{second}: oldest is 'ledger_9999'; allowed: itself, or an earlier revision",
        f"{data}: it contracts, so with_ledger has to name the contraction of the ledger that "
        "keeps older code away",
    ]
    await database.dispose()


async def test_a_contraction_may_take_away(
    database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    database = Database(database_url, setting="LEDGER_URL", pooled=False)
    add_migration(
        monkeypatch, tmp_path, LEDGER_HISTORY, "ALTER TABLE batch_runs DROP COLUMN message"
    )
    assert await problems(database, LEDGER_HISTORY, DATA_HISTORY) == []
    await database.dispose()
