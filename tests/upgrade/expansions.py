"""The linter of migrations: what may be in one beside which older code goes on working.

Such a migration *expands*: its `oldest` names an earlier revision. It may add a table, an index
that is not unique, and a column that older code need not know. It is tried on a real database, and
the tables are compared, so it makes no difference how it is written. One that *contracts* names
itself, and may do anything, because older code neither starts nor goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, inspect

from batch_system.database.alembic_history import script_directory
from batch_system.database.engine import Database
from batch_system.database.migrate import History, migrate

Facts = Mapping[str, Mapping[str, Any]]
"""Of each table, by name: each column, index and constraint, by a name of its own, as text."""


async def problems(database: Database, *histories: History) -> list[str]:
    """What is wrong with the migrations of these histories, tried one after the other.

    The last history may need one of the first: a contraction beside the data keeps no older code
    away by itself, so it names, as `with_ledger`, the contraction of the ledger that does.
    """
    found: list[str] = []
    contractions: set[str] = set()
    for history in histories:
        modules = _modules(history)
        for number, revision in enumerate(history.revisions):
            before = await facts_of(database)
            await migrate(database, history, to=revision)
            after = await facts_of(database)
            oldest = getattr(modules[revision], "oldest", None)
            if oldest == revision:
                contractions.add(revision)
                if history is not histories[0]:
                    found += _without_ledger(modules[revision], revision, contractions, number)
            elif oldest not in history.revisions[:number]:
                found.append(
                    f"{revision}: oldest is {oldest!r}; allowed: itself, or an earlier revision"
                )
            else:
                found += [f"{revision}: {what}" for what in refused(before, after)]
    return found


def _without_ledger(
    module: Any, revision: str, contractions: set[str], number: int
) -> Iterator[str]:
    if number > 0 and getattr(module, "with_ledger", None) not in contractions:
        yield (
            f"{revision}: it contracts, so with_ledger has to name the contraction of the ledger "
            "that keeps older code away"
        )


def _modules(history: History) -> dict[str, Any]:
    scripts = script_directory(history.folder)
    return {name: scripts.get_revision(name).module for name in history.revisions}


def refused(before: Facts, after: Facts) -> list[str]:
    """What older code would notice of the difference."""
    found = [f"drops the table {name}" for name in before if name not in after]
    for table, facts in before.items():
        now = after.get(table, facts)
        for name, was in facts.items():
            if name not in now:
                found.append(f"drops {name} of {table}")
            elif now[name] != was:
                found.append(f"changes {name} of {table}")
        found += [
            f"adds {name} to {table}: {why}"
            for name, fact in now.items()
            if name not in facts and (why := _is_felt(name, fact))
        ]
    return found


def _is_felt(name: str, fact: Any) -> str | None:
    """Why older code can't do without knowing this new part of a table that it uses."""
    kind = name.partition(" ")[0]
    if kind == "column":
        is_filled = fact["nullable"] or fact["default"] is not None
        return None if is_filled else "it is NOT NULL and has no default"
    if kind == "index":
        return "it is unique" if fact["unique"] else None
    return "older code may not satisfy it"


async def facts_of(database: Database) -> Facts:
    async with database.reader.connect() as connection:
        return await connection.run_sync(_facts)


def _facts(connection: Connection) -> Facts:
    inspector = inspect(connection)
    return {name: dict(_of(inspector, name)) for name in inspector.get_table_names()}


def _of(inspector: Any, table: str) -> Iterator[tuple[str, Any]]:
    for column in inspector.get_columns(table):
        kept = {name: column[name] for name in ("nullable", "default")}
        yield f"column {column['name']}", {**kept, "type": str(column["type"])}
    for index in inspector.get_indexes(table):
        options = {name: str(value) for name, value in index.get("dialect_options", {}).items()}
        columns = list(index["column_names"])
        yield f"index {index['name']}", {"unique": bool(index["unique"]), "of": columns, **options}
    yield "primary key", list(inspector.get_pk_constraint(table)["constrained_columns"])
    rules: Sequence[tuple[str, Any]] = (
        ("unique constraint", inspector.get_unique_constraints(table)),
        ("check", inspector.get_check_constraints(table)),
        ("foreign key", inspector.get_foreign_keys(table)),
    )
    for kind, found in rules:
        for rule in found:
            yield f"{kind} {rule['name'] or sorted(map(str, rule.items()))}", str(rule)
