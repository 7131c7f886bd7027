"""Reads runs and missed ranges from the ledger for tests, which get them without `await`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import run_logs
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.batch.ledger.states import FINAL
from batch_system.batch.ledger.tables import attempts, log, missed, runs
from batch_system.database.engine import Database
from batch_system.operations.asking.databases import Databases
from batch_system.settings.reading import get_settings
from batch_system.testing.databases import wait_for

T = TypeVar("T")


@dataclass(frozen=True)
class CommittedChunk:
    """A committed chunk of a run.

    Attributes:
      loop: The name of its loop. A loop without a name has its number in the run: "1".
      number: Its number in its loop, from 1, counted through all attempts.
      items: The items of the chunk.
    """

    loop: str
    number: int
    items: list[Any]


@dataclass(frozen=True)
class RunRecord:
    """The row of a run in the ledger. Instants are aware, in UTC.

    Attributes:
      slot: The instant at which it was due; None for a manual run that was started without a
          slot.
      state: `succeeded`, `failed`, `skipped`, … (see the states in the docs).
      reason: Why it is not `succeeded`, as text for a person.
      result: The value that `run()` returned, as it is read back from JSON.
      attempt: How many attempts have begun.
      error: The error of its last failed attempt: `type`, `message`, `traceback`. None if no
          attempt has failed.
      logs: The lines that it has logged, oldest first: `text`, `level`, `logger`, `at`.
      chunks: The chunks that all its attempts have committed, in the order of their commits.
    """

    id: str
    task: str
    slot: datetime | None
    origin: str
    state: str
    reason: str | None
    params: dict[str, Any] | None
    result: Any
    attempt: int
    count: int | None
    total: int | None
    part: int | None
    key: str | None
    parent: str | None
    requested_by: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: dict[str, str] | None
    chunks: list[CommittedChunk] = field(repr=False, compare=False)
    _blocks: list[bytes] = field(repr=False, compare=False)

    @cached_property
    def logs(self) -> list[LogLine]:
        return [line for block in self._blocks for line in run_logs.unpack(block)]


@dataclass(frozen=True)
class MissedRange:
    """Consecutive slots of a task that did not run: how many, the first, the last, and the
    reason.
    """

    task: str
    first_slot: datetime
    last_slot: datetime
    count: int
    reason: str


Committed = Mapping[str, list[CommittedChunk]]
"""The chunks that each run has committed, by the id of the run."""


def run_records(chunks: Committed, **values: str | None) -> list[RunRecord]:
    """The runs whose columns have these values, oldest first. None stands for any value."""
    return wait_for(_with_ledger(lambda connection: _run_records(connection, chunks, values)))


def ended_ids() -> set[str]:
    """The ids of the runs that are in a final state."""
    statement = select(runs.c.id).where(runs.c.state.in_(FINAL))
    return wait_for(_with_ledger(lambda connection: _ids(connection, statement)))


def missed_ranges(task: str | None) -> list[MissedRange]:
    """The missed ranges of a task, or those of all tasks, oldest first."""
    return wait_for(_with_ledger(lambda connection: _missed_ranges(connection, task)))


async def _with_ledger(work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    settings = get_settings()
    ledger = Database(settings.ledger_url, setting=settings.ledger_setting, pooled=False)
    async with Databases(ledger, ledger, settings, are_ready=True).reading() as connection:
        assert connection is not None, "the fixture `batch` has created the tables of the ledger"
        return await work(connection)


async def _ids(connection: AsyncConnection, statement: Select[Any]) -> set[str]:
    return set((await connection.execute(statement)).scalars())


async def _run_records(
    connection: AsyncConnection, chunks: Committed, values: dict[str, str | None]
) -> list[RunRecord]:
    conditions = [runs.c[name] == value for name, value in values.items() if value is not None]
    names = [each.name for each in fields(RunRecord) if each.name in runs.c]
    statement = select(*(runs.c[name] for name in names)).where(*conditions).order_by(runs.c.id)
    ids = select(runs.c.id).where(*conditions)
    failed = select(attempts.c.run, attempts.c.error).where(
        attempts.c.error.is_not(None), attempts.c.run.in_(ids)
    )
    errors = dict(map(tuple, await connection.execute(failed.order_by(attempts.c.fence))))
    blocks: dict[str, list[bytes]] = {}
    logged = (
        select(log.c.run, log.c.block)
        .where(log.c.run.in_(ids))
        .order_by(log.c.fence, log.c.first_line)
    )
    for run, block in await connection.execute(logged):
        blocks.setdefault(run, []).append(block)
    rows = (await connection.execute(statement)).mappings()
    return [
        RunRecord(
            **row,
            error=errors.get(row["id"]),
            chunks=list(chunks.get(row["id"], [])),
            _blocks=blocks.get(row["id"], []),
        )
        for row in rows
    ]


async def _missed_ranges(connection: AsyncConnection, task: str | None) -> list[MissedRange]:
    columns = [missed.c[each.name] for each in fields(MissedRange)]
    statement = select(*columns).order_by(missed.c.first_slot, missed.c.task)
    if task is not None:
        statement = statement.where(missed.c.task == task)
    return [MissedRange(*row) for row in await connection.execute(statement)]
