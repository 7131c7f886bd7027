"""Cancelling a run: at once where nobody works on it, else by a request that its node sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, case, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time
from service.batch.ledger.states import ACTIVE, RunState
from service.batch.ledger.tables import runs


@dataclass(frozen=True)
class Asked:
    """A request to cancel a run that is running under this fence; `is_pause`: to have it stop, and go on later."""

    run: str
    fence: int
    reason: str
    is_pause: bool = False


async def request_cancel(connection: AsyncConnection, run_id: str, reason: str, by: str) -> RunState | None:
    """Cancel an active run, in the caller's transaction; returns its state then, or None where there is no such run.

    CANCELLED: it was waiting (queued, retrying, interrupted), and is over now. RUNNING: the request stands on its row.
    The node that holds it looks for requests every second (see news.py) and cancels the attempt,
    which then ends as `cancelled` with this reason; a node that dies before that, or whose attempt ends with a retry or
    an interrupt meanwhile, leaves it cancelled too (`runs.finish`). So a run with a request never starts again, but it
    may yet succeed or fail. Any other state: it was final already, and nothing was changed. The first request counts.

    Args:
        reason: What will stand on the row, a sentence without a full stop, such as "cancelled by ann".
        by: Who asked: a user's name, or "task x".
    """
    now = await database_time.now_of(connection)
    waiting = {"state": RunState.CANCELLED, "reason": reason, "finished_at": now}
    asked = {"cancel_at": now, "cancel_by": by, "cancel_reason": reason}
    values: dict[str, ColumnElement[Any]] = {name: _unless_running(name, value) for name, value in waiting.items()}
    values |= {name: func.coalesce(runs.c[name], literal(value, runs.c[name].type)) for name, value in asked.items()}
    statement = update(runs).where(runs.c.id == run_id, runs.c.state.in_(ACTIVE)).values(values)
    state = (await connection.execute(statement.returning(runs.c.state))).scalar()
    if state is None:
        state = (await connection.execute(select(runs.c.state).where(runs.c.id == run_id))).scalar()
    return RunState(state) if state is not None else None


def _unless_running(name: str, value: Any) -> ColumnElement[Any]:
    own = runs.c[name]
    return case((runs.c.state == RunState.RUNNING, own), else_=literal(value, own.type))
