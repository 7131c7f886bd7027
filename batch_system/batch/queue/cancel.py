"""Cancelling a run: at once if it is waiting, otherwise by a request that the run's node reads."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time, transitions
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import runs


@dataclass(frozen=True)
class StopRequest:
    """A request to stop the run `run`, which is running under `fence`.

    `is_pause`: the task was paused, and the run resumes later. Otherwise the run is cancelled.
    """

    run: str
    fence: int
    reason: str
    is_pause: bool = False


async def request_cancel(
    connection: AsyncConnection, run_id: str, reason: str, by: str
) -> RunState | None:
    """Cancel an active run, in the caller's transaction. Returns the state of the run after that;
    None if there is no such run.

    CANCELLED: the run was waiting (queued, retrying, interrupted), and is cancelled now. RUNNING:
    the request was written to the row of the run. The node that holds the run reads requests every
    second (see ledger_poll.py) and cancels the attempt, which then ends as `cancelled` with this
    reason. If the node dies before that, or if the attempt ends with a retry or an interrupt, the
    run is cancelled too (`transitions.finish`). So a run with a request never starts again, but its
    current attempt may still succeed or fail. WAITING: the run was split, and some of its parts are
    running. All of them are asked to stop, and the run is cancelled once they have ended. Any other
    state: the run had already ended, and nothing was changed. A second request changes nothing.

    Args:
      reason: The reason that is written to the row: a sentence without a full stop, such as
          "cancelled by ann".
      by: Who asks for it: a user's name, or "task x".
    """
    now = await database_time.now_of(connection)
    states = await transitions.cancel(connection, [run_id], reason, by, now)
    if run_id in states:
        return states[run_id]
    final_state = (
        await connection.execute(select(runs.c.state).where(runs.c.id == run_id))
    ).scalar()
    return RunState(final_state) if final_state is not None else None
