"""A ledger with many rows that do not concern the node of a test. The database makes them itself: a
million runs take seconds.

The plans of queries are tested on it, and bench/growth.py measures on it. A quarter of the runs has
ended; a quarter is queued for tasks that no node has loaded; a quarter for tasks that are paused; a
quarter is retried tomorrow. Half of each is in a queue, and half may run at once. All are older
than a day.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.tables import new_id
from batch_system.batch.ledger.wakes import catalog_changed
from batch_system.database.engine import Database

KINDS = ("over", "theirs", "paused", "later")
OF_A_KIND = 10
"""Tasks."""

_RUNS = (
    "INSERT INTO batch_runs (id, task, origin, state, rank, catch_up, exclusive, due_at, "
    "attempt, fence, created_at, "
    "started_at, attempt_started_at, finished_at) "
)
_ATTEMPTS = (
    "INSERT INTO batch_attempts (run, fence, number, started_at, ended_at, outcome) "
    "SELECT id, 1, 1, started_at, finished_at, state FROM batch_runs WHERE finished_at IS NOT NULL"
)

_SQLITE = {
    "series": "WITH RECURSIVE n(i) AS "
    "(SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < :count - 1)",
    "id": "printf('%08x-0000-7000-8000-%012x', i, i)",
    "from": "FROM n",
    "number": "CAST({} AS text)",
    "at": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '{}', '+' || (i / 1000.0) || ' seconds')",
}
_POSTGRESQL = {
    "series": "",
    "id": "(lpad(to_hex(i), 8, '0') || '-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid",
    "from": "FROM generate_series(0, CAST(:count AS integer) - 1) AS n(i)",
    "number": "CAST({} AS text)",
    "at": "(now() + interval '{}' + i * interval '1 ms')",
}


def words(database: Database) -> dict[str, str]:
    return _SQLITE if database.kind == "sqlite" else _POSTGRESQL


async def crowd(
    database: Database, runs: int, tasks: int = 0, nodes: int = 0, analyze: bool = True
) -> None:
    """Put this number of other runs into a ledger, and `tasks` more with a schedule, and `nodes`
    more that live.
    """
    async with database.engine.begin() as connection:
        await _fill_tasks(database, connection, tasks)
        await _fill_nodes(database, connection, nodes)
        if runs:
            await _fill_runs(database, connection, runs)
        await catalog_changed(connection)
    if analyze and database.kind == "postgresql":  # as autovacuum would; nobody does it for SQLite
        async with database.engine.begin() as connection:
            await connection.execute(text("ANALYZE"))


async def _fill_runs(database: Database, connection: AsyncConnection, count: int) -> None:
    say = words(database)
    task = (
        "CASE i % 4 "
        + " ".join(f"WHEN {n} THEN '{kind}-'" for n, kind in enumerate(KINDS))
        + " END"
    )
    task += " || " + say["number"].format(f"i / 8 % {OF_A_KIND}")
    over = f"CASE WHEN i % 4 = 0 THEN {say['at'].format('-2 days')} END"
    values = [
        *(
            say["id"],
            task,
            "'manual'",
            "CASE i % 4 WHEN 0 THEN 'succeeded' WHEN 3 THEN 'retrying' ELSE 'queued' END",
        ),
        *("2", "false", f"CASE WHEN i / 4 % 2 = 0 THEN {task} END"),
        f"CASE WHEN i % 4 = 3 THEN {say['at'].format('+1 days')} ELSE "
        f"{say['at'].format('-2 days')} END",
        *(
            "CASE WHEN i % 4 IN (1, 2) THEN 0 ELSE 1 END",
            "1",
            say["at"].format("-2 days"),
            over,
            over,
            over,
        ),
    ]
    statement = f"{say['series']} {_RUNS} SELECT {', '.join(values)} {say['from']}"
    if database.kind == "sqlite":
        statement = (
            f"{_RUNS} SELECT * FROM ({say['series']} SELECT {', '.join(values)} {say['from']})"
        )
    await connection.execute(text(statement), {"count": count})
    await connection.execute(text(_ATTEMPTS))


async def _fill_tasks(database: Database, connection: AsyncConnection, count: int) -> None:
    """Those of the other runs, and so many with a schedule, fired up to now: `many-0`, `many-1` and
    so on.
    """
    now = text(
        "SELECT strftime('%Y-%m-%d %H:%M:%f000', 'now')"
        if database.kind == "sqlite"
        else "SELECT now()"
    )
    at = (await connection.execute(now)).scalar_one()
    names = [f"{kind}-{n}" for kind in KINDS for n in range(OF_A_KIND)] + [
        f"many-{n}" for n in range(count)
    ]
    task = text(
        "INSERT INTO batch_tasks (name, description, source, policies, first_seen_at, "
        "last_seen_at, paused_at, "
        "paused_by) VALUES (:name, '', 'tasks/many.py', '{}', :at, :at, :paused_at, :paused_by)"
    )
    paused: dict[bool, dict[str, Any]] = {
        True: {"paused_at": at, "paused_by": "ann"},
        False: {"paused_at": None, "paused_by": None},
    }
    rows = [{"name": name, "at": at, **paused[name.startswith("paused")]} for name in names]
    await connection.execute(task, rows)
    schedule = text(
        "INSERT INTO batch_schedules (id, task, cron, timezone, valid_from, node, fired_until) "
        "VALUES (:id, :task, '0 0 1 1 *', 'UTC', :at, :node, :at)"
    )
    if count:
        owned = [
            {"id": new_id(), "task": f"many-{n}", "at": at, "node": new_id()} for n in range(count)
        ]
        await connection.execute(schedule, owned)


async def _fill_nodes(database: Database, connection: AsyncConnection, count: int) -> None:
    now = "strftime('%Y-%m-%d %H:%M:%f000', 'now')" if database.kind == "sqlite" else "now()"
    node = text(
        "INSERT INTO batch_nodes (id, host, pid, version, started_at, seen_at, draining, tasks, "
        "fires) "
        f"VALUES (:id, 'elsewhere', 1, '1', {now}, {now}, false, '[]', true)"
    )
    if count:
        await connection.execute(node, [{"id": new_id()} for _ in range(count)])
