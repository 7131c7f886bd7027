"""Status: whether something is wrong with the service, in one answer for people and
monitors.

Night decides what is wrong (operations/night), so the two always agree.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import RowMapping, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import gauges
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.runs import LISTED
from batch_system.batch.ledger.states import CLAIMABLE, RunState
from batch_system.batch.ledger.tables import OPEN_FAILURE_SQL, backups, is_one_of, runs
from batch_system.errors import NoLedger
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import RunSummary
from batch_system.operations.night.night import night
from batch_system.operations.night.results import Need, Night, Status, Trouble
from batch_system.operations.people.redacting import hidden_tasks, without_texts
from batch_system.operations.system import pools
from batch_system.operations.system.nodes import living_nodes

IS_FAILED_SQL = is_one_of([RunState.FAILED])
MOST_FAILED = 200
MOST_COUNTED = 10_000


NO_SERVICE_YET = "there is no ledger yet: no service has ever run"

NEVER_RUN = Status(
    ok=False,
    level="alarm",
    headline=NO_SERVICE_YET,
    sentence="",
    troubles=[Trouble(kind="down", text=NO_SERVICE_YET)],
    nodes=[],
    pools=[],
    last_beat=None,
    running=0,
    queued=0,
    failed=0,
    failed_runs=[],
    quarantined=0,
    newest_backup=None,
)


async def status(context: Context) -> Status:
    """Whether something is wrong, and what. Raises DatabaseError if the ledger can't be read."""
    try:
        answer = await night(context)
    except NoLedger:
        return NEVER_RUN
    async with context.databases.reading() as connection:
        if connection is None:
            return NEVER_RUN
        totals = await gauges.totals(connection)
        now, counted = totals.now, totals.by_state
        return Status(
            ok=answer.level in ("calm", "watch"),
            level=answer.level,
            headline=answer.headline,
            sentence=answer.sentence,
            troubles=[Trouble(kind=need.kind, text=_text_of(need)) for need in answer.needs],
            nodes=[
                node
                for node in await living_nodes(connection, context, now)
                if node.fires or node.pools
            ],
            pools=await pools.read(connection, context),
            last_beat=answer.last_beat,
            running=counted[RunState.RUNNING],
            queued=sum(counted[state] for state in CLAIMABLE),
            failed=await _number_failed(connection),
            failed_runs=await _failed(connection, context, now),
            quarantined=_quarantined(answer),
            newest_backup=(await connection.execute(select(func.max(backups.c.taken_at)))).scalar(),
        )


def _text_of(need: Need) -> str:
    about = need.task or need.subject
    if need.kind != "failed":
        return f"{about}: {need.error}" if about else need.error
    if need.tasks:
        return f"{len(need.tasks):,} tasks failed with one error: {need.error}"
    runs = need.open + need.retrying
    failed = "1 run failed" if runs == 1 else f"{runs:,} runs failed"
    return f"{about}: {failed}" + (f": {need.error}" if need.error else "")


def _quarantined(answer: Night) -> int:
    return sum(need.open for need in answer.needs if need.kind == "quarantine")


async def newest_failed(connection: AsyncConnection) -> list[RowMapping]:
    """The newest MOST_FAILED of the failed runs that are open, newest first. Reads at most
    MOST_COUNTED of them.
    """
    is_open = run_rows(("id", "created_at"), OPEN_FAILURE_SQL, IS_FAILED_SQL)
    some = is_open.limit(MOST_COUNTED).subquery()
    newest = (
        select(some.c.id).order_by(some.c.created_at.desc(), some.c.id.desc()).limit(MOST_FAILED)
    )
    query = run_rows(LISTED, runs.c.id.in_(newest))
    rows = (await connection.execute(query)).mappings().all()
    return sorted(rows, key=lambda row: (row["created_at"], row["id"]), reverse=True)


async def _number_failed(connection: AsyncConnection) -> int:
    """How many failed runs are open, counted up to MOST_COUNTED."""
    some = run_rows(("id",), OPEN_FAILURE_SQL, IS_FAILED_SQL).limit(MOST_COUNTED)
    return (
        await connection.execute(select(func.count()).select_from(some.subquery()))
    ).scalar_one()


async def _failed(connection: AsyncConnection, context: Context, now: datetime) -> list[RunSummary]:
    failed = [RunSummary.at(row, now) for row in await newest_failed(connection)]
    return without_texts(failed, await hidden_tasks(connection, context))
