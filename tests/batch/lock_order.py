"""Sees in which order transactions lock rows of the ledger: two that do it in different orders can
deadlock.

A statement that skips locked rows waits for nobody, so it may come in any place. What it has locked
is locked all the same: a statement that waits for rows of an earlier table must not come after it.

The order of rows within one table can't be seen from the statements. Who locks several runs locks
them by id in one statement; an opening, which has locked waiting runs, waits for none after that.
See tests/waiting/test_deadlocks.py.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, event

from batch_system.database.engine import Database

ORDER = ("batch_tasks", "batch_schedules", "batch_runs", "batch_incidents")
WRITES = re.compile(r"(?:INSERT INTO|UPDATE|DELETE FROM) (batch_\w+)")
READS = re.compile(r"SELECT\b.*?\sFROM (batch_\w+).*\sFOR UPDATE(?: OF (batch_\w+))?", re.DOTALL)
ONE_ROW = re.compile(r"WHERE batch_tasks\.name = ")


def watch(database: Database) -> list[str]:
    """Collects the statements of this database, from now on, that lock in another order than
    ORDER.
    """
    wrong: list[str] = []

    def begin(connection: Connection) -> None:
        connection.info["locked"] = set()

    def see(connection: Connection, _: Any, statement: str, *__: Any) -> None:
        if (table := locked_by(statement)) is None:
            return
        locked = connection.info.setdefault("locked", set())
        waits = "SKIP LOCKED" not in statement
        if (
            waits
            and table not in locked
            and any(ORDER.index(other) > ORDER.index(table) for other in locked)
        ):
            wrong.append(f"{statement!r} locks {table} after {sorted(locked)}")
        is_sorted = "ORDER BY" in statement or ONE_ROW.search(statement) is not None
        if table == "batch_tasks" and table not in locked and not is_sorted:
            wrong.append(f"{statement!r} locks several rows of {table} in no order")
        locked.add(table)

    event.listen(database.engine.sync_engine, "begin", begin)
    event.listen(database.engine.sync_engine, "before_cursor_execute", see)
    return wrong


def locked_by(statement: str) -> str | None:
    """The table of ORDER whose rows a statement locks; None if it locks none of them."""
    written, read = WRITES.match(statement), READS.match(statement)
    table = written[1] if written else (read[2] or read[1]) if read else None
    return table if table in ORDER else None
