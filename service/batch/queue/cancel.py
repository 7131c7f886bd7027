"""Cancelling a run: at once where nobody works on it, else by a request that its node sees."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time, transitions
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import runs


@dataclass(frozen=True)
class StopRequest:
    """A request to stop a run that runs under this fence. `is_pause`: it goes on later; otherwise it is cancelled."""

    run: str
    fence: int
    reason: str
    is_pause: bool = False


async def request_cancel(connection: AsyncConnection, run_id: str, reason: str, by: str) -> RunState | None:
    """Cancel an active run, in the caller's transaction; returns its state then, or None where there is no such run.

    CANCELLED: it was waiting (queued, retrying, interrupted), and is over now. RUNNING: the request stands on its row.
    The node that holds the run looks for requests every second (see ledger_poll.py) and cancels the attempt, which then
    ends as `cancelled` with this reason. If the node dies before that, or the attempt ends with a retry or an interrupt
    meanwhile, the run is cancelled too (`transitions.finish`). So a run with a request never starts again, but it may
    yet succeed or fail. Any other state: the run was over already, and nothing was changed. The first request counts.

    Args:
        reason: What will stand on the row, a sentence without a full stop, such as "cancelled by ann".
        by: Who asked: a user's name, or "task x".
    """
    now = await database_time.now_of(connection)
    state = await transitions.cancel(connection, run_id, reason, by, now)
    if state is not None:
        return state
    final = (await connection.execute(select(runs.c.state).where(runs.c.id == run_id))).scalar()
    return RunState(final) if final is not None else None
