"""A restore's messages about errors of the server: they give the cause, and no values of rows."""

from __future__ import annotations

import asyncpg
import pytest

from batch_system.backup.postgresql.server import cause_of
from tests.backup.contents import connected

TABLES = """
CREATE TABLE parent (email text PRIMARY KEY);
CREATE TABLE child (email text REFERENCES parent, age int CHECK (age > 0));
INSERT INTO parent VALUES ('ada@example.org');
"""


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "INSERT INTO child VALUES ('secret@example.org', 1)",
            'insert or update on table "child" violates foreign key constraint "child_email_fkey" '
            '(Key (email) is not present in table "parent".)',
        ),
        (
            "INSERT INTO parent VALUES ('ada@example.org')",
            'duplicate key value violates unique constraint "parent_pkey" (Key (email) already '
            "exists.)",
        ),
        (
            "INSERT INTO child VALUES ('ada@example.org', -1)",
            'new row for relation "child" violates check constraint "child_age_check"',
        ),
        ("INSERT INTO child VALUES (NULL, 'secret')", 'invalid input syntax for type integer: "…"'),
    ],
)
async def test_an_error_about_rows_has_none_of_their_values(
    postgres_database: str, statement: str, said: str
) -> None:
    async with connected(postgres_database) as connection:
        await connection.execute(TABLES)
        with pytest.raises(asyncpg.PostgresError) as caught:
            await connection.execute(statement)
    assert cause_of(caught.value) == said
