"""No error shows the parameters of its statement, unless the setting says so."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from sqlalchemy import Column, Enum, MetaData, String, Table, text
from sqlalchemy.exc import IntegrityError, StatementError

from batch_system.database.engine import Database

SECRET = "topsecretvalue"


async def error_of(
    database: Database, statement: Any, *given: Any, table: str = ""
) -> StatementError:
    """The error that the last of these executions raises, in one transaction with the others."""

    async def execute() -> None:
        async with database.engine.begin() as connection:
            if table:
                await connection.execute(text(table))
            for values in given:
                await connection.execute(statement, values)

    with pytest.raises(StatementError) as caught:
        await execute()
    return caught.value


def whole(error: BaseException) -> str:
    """Every text of the error: its traceback with all causes, and its messages."""
    original = getattr(error, "orig", None)
    return "".join(
        [*traceback.format_exception(error), str(error), repr(error), str(original), repr(original)]
    )


TABLE = "CREATE TABLE people (email VARCHAR(100) PRIMARY KEY, age INTEGER NOT NULL CHECK (age > 0))"
ADD = text("INSERT INTO people (email, age) VALUES (:email, :age)")
MANY = text("INSERT INTO people (email, age) VALUES (:email, 1)")


async def test_a_broken_constraint_does_not_show_the_row(application: Database) -> None:
    row = {"email": SECRET, "age": 1}
    for given in ([row, row], [{**row, "age": 0}], [{**row, "age": None}]):
        error = await error_of(application, ADD, *given, table=TABLE)
        assert isinstance(error, IntegrityError)
        assert SECRET not in whole(error)
        assert "INSERT INTO people" in str(error) and "constraint" in str(error.orig)


async def test_a_statement_that_fails_does_not_show_its_values(application: Database) -> None:
    for statement in (
        "SELECT * FROM nowhere WHERE name = :name",
        "SELECT 1 / CAST(:name AS nothing)",
    ):
        assert SECRET not in whole(await error_of(application, text(statement), {"name": SECRET}))


async def test_a_value_of_a_wrong_type_is_not_shown(application: Database) -> None:
    kinds = Table(
        "kinds", MetaData(), Column("kind", Enum("a", "b", name="kinds")), Column("name", String)
    )
    error = await error_of(application, kinds.insert(), {"kind": SECRET, "name": "x"})
    assert SECRET not in whole(error)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT CAST(CAST(:value AS text) AS integer)",
        "SELECT CAST(CAST(:value AS text) AS timestamptz)",
        "SELECT CAST(:value AS integer)",
        "SELECT CAST(:value AS uuid)",
        "SELECT CAST(:value AS jsonb)",
        "SELECT * FROM jsonb_to_recordset(CAST(:json AS jsonb)) AS v(n integer)",
    ],
)
async def test_postgresql_and_its_driver_do_not_quote_a_wrong_value(
    postgres_database: str, statement: str
) -> None:
    database = Database(postgres_database, setting="DATABASE_URL", pooled=False)
    value = (
        {"value": f"{SECRET} {'x' * 100}"}
        if ":value" in statement
        else {"json": f'[{{"n": "{SECRET}"}}]'}
    )
    error = await error_of(database, text(statement), value)
    assert SECRET not in whole(error)


async def test_an_error_of_many_rows_shows_none_of_their_values(application: Database) -> None:
    error = await error_of(application, MANY, [{"email": SECRET}, {"email": SECRET}], table=TABLE)
    assert isinstance(error, IntegrityError) and SECRET not in whole(error)


async def test_the_setting_makes_errors_show_their_values(database_url: str) -> None:
    database = Database(database_url, setting="DATABASE_URL", pooled=False, shows_values=True)
    row = {"email": SECRET, "age": 1}
    assert SECRET in str(await error_of(database, ADD, row, row, table=TABLE))


async def test_a_missing_table_is_told_with_the_way_to_make_it(database_url: str) -> None:
    database = Database(database_url, setting="LEDGER_URL")
    missing = await error_of(database, text("SELECT * FROM batch_tasks"), {})
    told = str(database.unreachable(missing))
    assert "batch_tasks" in told and "(a service makes the tables when it first starts)" in told
    assert "<class" not in told
    await database.dispose()
