"""Wakes: a transaction that queues runs for other nodes, or asks something of them, notifies them
when it commits.

PostgreSQL: one NOTIFY in the transaction, at most, because commits with a NOTIFY wait for each
other in the whole server. SQLite: a number in `batch_catalog` rises, which other processes compare
with the one they have seen. Notifications are only hints: the polls find the same without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, Text, TextClause, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import tasks as tasks_table
from batch_system.database import sql

CATALOG, QUEUED, ASKED = 1, 2, 3
"""The rows of `batch_catalog`. On PostgreSQL only the first one is used."""

CHANNEL_SQL = "concat('batch_', left(current_schema(), 50))"
"""The channel of a ledger on PostgreSQL. Ledgers in several schemas of one database have a channel
each.
"""

ASKS, POOL = "asks", "pool:"
MOST_CHARACTERS = 4_000
"""A payload is cut at this length, because PostgreSQL refuses one of 8,000. Pools that it leaves
out are polled.
"""

ONLY_BY_POLLS = (
    "this node finds what other processes queue, cancel or change by its polls only, up to "
    "POLL_SECONDS later"
)
"""What is said where no notification arrives."""

_NAMES = json_rows.source([tasks_table.c.name], "postgresql")
# Nothing is added to a notification queue that is half full because some session of the server does
# not read it: a full queue would make commits fail.
_NOTIFY = sql.statement(
    f"SELECT pg_notify({CHANNEL_SQL}, left(concat_ws(' ', current_setting('application_name'), "
    ":asks, "
    f"(SELECT string_agg(DISTINCT '{POOL}' || t.pool, ' ') FROM batch_tasks t "
    "WHERE t.name = ANY(ARRAY("
    f"SELECT v.name FROM {_NAMES})))), {MOST_CHARACTERS})) "
    "WHERE pg_notification_queue_usage() < 0.5",
    asks=Text(),
)

Takes = Callable[[Mapping[str, int]], bool]
"""Whether the engine of this process has room for this many runs of each task. It is woken after
the commit.
"""
_takers: WeakKeyDictionary[Engine, Takes] = WeakKeyDictionary()


@dataclass(frozen=True)
class Wake:
    """What a node was notified of.

    Attributes:
        pools: The pools with runs that may start; None: it may be any pool.
        asks: Whether runs are to be stopped, or tasks or schedules have changed.
    """

    pools: frozenset[str] | None = frozenset()
    asks: bool = False

    def __or__(self, other: Wake) -> Wake:
        pools = None if self.pools is None or other.pools is None else self.pools | other.pools
        return Wake(pools, self.asks or other.asks)

    @classmethod
    def of(cls, payload: str, node: str) -> Wake:
        """What a notification means for this node, whose engine already knows about the runs that
        the node itself has queued.

        Anybody with an account on the database can send one, so words that are not understood are
        ignored.
        """
        sender, *words = payload.split(" ")
        pools = (word.removeprefix(POOL) for word in words if word.startswith(POOL))
        is_own = sender.startswith(f"batch/{node}")
        return cls(frozenset() if is_own else frozenset(pools), ASKS in words)


@dataclass
class _Told:
    """What a transaction has to notify other nodes of. `queued`, `started`: the number of its new
    runs of each task, by their state.
    """

    queued: Counter[str] = field(default_factory=Counter)
    started: Counter[str] = field(default_factory=Counter)
    asks: bool = False


_told: WeakKeyDictionary[Connection, _Told] = WeakKeyDictionary()


def use_engine(engine: AsyncEngine, takes: Takes) -> None:
    """In transactions of this engine, do not notify other nodes of runs that the node of this
    process takes itself.
    """
    _takers[engine.sync_engine] = takes


def use_no_engine(engine: AsyncEngine) -> None:
    """Notify other nodes of all runs that are queued in transactions of this engine, because the
    node of this process stops.
    """
    _takers.pop(engine.sync_engine, None)


def queued(connection: AsyncConnection, tasks: Iterable[str], started: Iterable[str] = ()) -> None:
    """At the commit, notify other nodes that runs of these tasks were queued, unless this process
    takes them all.

    `started`: the tasks of runs that the transaction has given to this process. They take up its
    room, and other nodes are not notified.
    """
    if numbers := Counter(tasks):
        told = _of_transaction(connection)
        told.queued += numbers
        told.started += Counter(started)


def asked(connection: AsyncConnection) -> None:
    """At the commit, notify other nodes that a run of theirs has to be stopped."""
    _of_transaction(connection).asks = True


async def catalog_changed(connection: AsyncConnection) -> None:
    """Raise the number of the catalog, so that the other nodes read tasks and schedules again, and
    notify them.

    It must be the transaction's last statement that takes a lock: the row stays locked until the
    commit.
    """
    await connection.execute(_raising(CATALOG))
    if connection.dialect.name == "postgresql":  # on SQLite the number itself is what others see
        asked(connection)


def _of_transaction(connection: AsyncConnection) -> _Told:
    sync_connection = connection.sync_connection
    assert sync_connection is not None
    if sync_connection not in _told:
        _told[sync_connection] = _Told()
        event.listen(sync_connection, "commit", _tell)
        event.listen(sync_connection, "rollback", _forget)
    return _told[sync_connection]


def _forget(connection: Connection) -> None:
    _told[connection] = _Told()


def _tell(connection: Connection) -> None:
    """Called right before the COMMIT."""
    told = _told[connection]
    _forget(connection)
    takes = _takers.get(connection.engine)
    is_for_others = bool(told.queued) and not (
        takes is not None and takes(told.queued + told.started)
    )
    if not is_for_others and not told.asks:
        return
    if connection.dialect.name == "postgresql":
        names = [{"name": name} for name in told.queued] if is_for_others else []
        rows = json_rows.encode(names, "postgresql")
        connection.execute(_NOTIFY, {"rows": rows, "asks": ASKS if told.asks else None})
        return
    for row, is_told in ((QUEUED, is_for_others), (ASKED, told.asks)):
        if is_told:
            connection.execute(_raising(row))


def _raising(row: int) -> TextClause:
    return text(
        f"INSERT INTO batch_catalog (id, version) VALUES ({row}, 1) "
        "ON CONFLICT (id) DO UPDATE SET version = batch_catalog.version + 1"
    )
