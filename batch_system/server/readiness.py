"""Why this process is not ready: which of its parts can't work now. `/readyz` and the ledger show
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from sqlalchemy.exc import DBAPIError

from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing.dispatcher import Dispatcher
from batch_system.batch.firing.schedule_sync import ScheduleSync
from batch_system.batch.ledger.schedules import ahead_in_words
from batch_system.batch.nodes.node import Node
from batch_system.concurrency.background import Background
from batch_system.concurrency.limits import limited
from batch_system.database import troubles
from batch_system.database.engine import Database
from batch_system.errors import DatabaseError
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

LOOK_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 1.0
"""How often a process looks for its troubles, and how often while it has some."""
ANSWER_SECONDS = 3.0
"""How long a database may take to answer."""
NO_ANSWER = "no answer within {:g} s"


class Troubles(Background):
    """Has the heartbeat write the troubles of this node to the ledger, so that any process can show
    them.

    It writes only troubles of two looks in a row: a database that was busy for a moment does not
    count.
    """

    def __init__(self, node: Node, look: Callable[[], Awaitable[Mapping[str, str]]]) -> None:
        self._node = node
        self._look = look

    async def _loop(self) -> None:
        before: Mapping[str, str] = {}
        while True:
            try:
                async with self.limited_turn():
                    now = await self._look()
            except TimeoutError:
                now = {"databases": NO_ANSWER.format(self.turn_seconds)}
            except Exception:  # the boundary of a background loop: the next look may succeed
                logger.exception(
                    "looking for the troubles of this process failed; the next look follows"
                )
                now = before
            self._node.tell({part: reason for part, reason in now.items() if part in before})
            before = now
            await asyncio.sleep(LOOK_AGAIN_SECONDS if self._node.troubles else LOOK_SECONDS)


def is_working(node: Node, dispatcher: Dispatcher, schedules: ScheduleSync) -> bool:
    """Whether slots are fired, and the heartbeat reaches the ledger."""
    fires = dispatcher.trouble is None and dispatcher.is_alive and not schedules.unfired.slots
    return fires and node.trouble is None and node.lease.is_held


async def reasons_while_stopping(application: Database, ledger: Database) -> dict[str, str]:
    """The parts of a stopping service that are not ready, each with the reason."""
    return {"service": "it is stopping"} | await _of_databases(application, ledger)


async def reasons(
    application: Database,
    ledger: Database,
    node: Node,
    engine: LocalEngine,
    firing: tuple[Dispatcher, ScheduleSync] | None,
) -> dict[str, str]:
    """The parts that are not ready, each with the reason. `firing`: None for a process that does
    not fire.
    """
    unready = await _of_databases(application, ledger)
    if (outage := node.outage.in_words) is not None:
        unready["ledger"] = outage
    unready |= node.replaced
    if node.trouble is not None:
        unready.setdefault("ledger", f"the heartbeat can't write to it ({node.trouble})")
    if engine.locked is not None:
        unready.setdefault("ledger", engine.locked)
    if engine.is_recheck_due:
        unready.setdefault(
            "ledger", "writing to it failed and is repeated; see the log for the error"
        )
    if firing is not None and firing[0].trouble is not None:
        unready.setdefault(
            "ledger", "slots can't be fired, which is repeated; see the log for the error"
        )
    if firing is not None and (unfired := firing[1].unfired.found) is not None:
        unready["firing"] = unfired.in_words
    if firing is not None and (ahead := firing[1].ahead):
        unready["clock"] = ahead_in_words(ahead)
    if not node.lease.is_held:
        unready["lease"] = "it could not be renewed, so no run is started until it is"
    return unready


async def _of_databases(application: Database, ledger: Database) -> dict[str, str]:
    found = await asyncio.gather(_trouble_with(application), _trouble_with(ledger))
    return {
        name: trouble
        for name, trouble in zip(("application", "ledger"), found, strict=True)
        if trouble
    }


async def _trouble_with(database: Database) -> str | None:
    """Why a database does not answer; None if it does."""
    try:
        async with limited(ANSWER_SECONDS):
            await database.answer()
    except (DBAPIError, DatabaseError, OSError) as error:
        return f"the database does not answer ({troubles.advice_on(error) or type(error).__name__})"
    return None
