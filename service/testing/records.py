"""Runs and missed ranges for tests, which read them without `await`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import run_logs
from service.batch.ledger.run_logs import LogLine
from service.batch.ledger.states import FINAL
from service.batch.ledger.tables import attempts, log, missed, runs
from service.config import get_settings
from service.database.engine import Database
from service.operations.databases import Databases
from service.testing.databases import wait_for

T = TypeVar("T")


@dataclass(frozen=True)
class CommittedChunk:
    """A committed chunk of a run.

    Attributes:
        loop: The name of its loop, or else the loop's number in the run: "1".
        number: Counts from 1 in its loop, through all attempts.
        items: What it held.
    """

    loop: str
    number: int
    items: list[Any]


@dataclass(frozen=True)
class RunRecord:
    """The row of a run in the ledger. Instants are aware, in UTC.

    Attributes:
        slot: The due instant; None for a manual run that was not given one.
        state: `succeeded`, `failed`, `skipped`, … (see the states in the docs).
        reason: Why it is not `succeeded`, for a person.
        result: What `run()` returned, as JSON has it.
        attempt: How many attempts were made.
        error: What the last failed attempt raised: `type`, `message`, `traceback`; None where none failed.
        logs: The lines that were logged in it, oldest first: `text`, `level`, `logger`, `at`.
        chunks: What all its attempts have committed in chunks, in this order: `loop`, `number`, `items`.
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
    """Slots of a task that did not run, from the first to the last of them."""

    task: str
    first_slot: datetime
    last_slot: datetime
    count: int
    reason: str


Committed = Mapping[str, list[CommittedChunk]]
"""By the id of the run."""


def run_records(chunks: Committed, **equal: str | None) -> list[RunRecord]:
    """The runs whose columns have these values (None: any), oldest first."""
    return wait_for(_with_ledger(lambda connection: _run_records(connection, chunks, equal)))


def ended_ids() -> set[str]:
    """The ids of the runs that are in a final state."""
    statement = select(runs.c.id).where(runs.c.state.in_(FINAL))
    return wait_for(_with_ledger(lambda connection: _ids(connection, statement)))


def missed_ranges(task: str | None) -> list[MissedRange]:
    return wait_for(_with_ledger(lambda connection: _missed_ranges(connection, task)))


async def _with_ledger(work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    settings = get_settings()
    ledger = Database(settings.ledger_url, setting=settings.ledger_setting, pooled=False)
    async with Databases(ledger, ledger, settings.LEASE_SECONDS, are_ready=True).reading() as connection:
        assert connection is not None, "the fixture has made the ledger"
        return await work(connection)


async def _ids(connection: AsyncConnection, statement: Select[Any]) -> set[str]:
    return set((await connection.execute(statement)).scalars())


async def _run_records(connection: AsyncConnection, chunks: Committed, equal: dict[str, str | None]) -> list[RunRecord]:
    chosen = [runs.c[name] == value for name, value in equal.items() if value is not None]
    names = [each.name for each in fields(RunRecord) if each.name in runs.c]
    found = select(*(runs.c[name] for name in names)).where(*chosen).order_by(runs.c.id)
    ids = select(runs.c.id).where(*chosen)
    failed = select(attempts.c.run, attempts.c.error).where(attempts.c.error.is_not(None), attempts.c.run.in_(ids))
    errors = dict(map(tuple, await connection.execute(failed.order_by(attempts.c.fence))))
    blocks: dict[str, list[bytes]] = {}
    lines = select(log.c.run, log.c.block).where(log.c.run.in_(ids)).order_by(log.c.fence, log.c.first_line)
    for run, block in await connection.execute(lines):
        blocks.setdefault(run, []).append(block)
    rows = (await connection.execute(found)).mappings()
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
