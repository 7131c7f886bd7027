"""The log of a run, block by block, also while it is being written; and its row, until it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import logs
from service.batch.ledger import database_time, run_logs
from service.batch.ledger import runs as run_rows
from service.batch.ledger.run_logs import Block, Packed
from service.batch.ledger.states import FINAL
from service.config import Settings
from service.errors import UnknownRun
from service.operations.details import run_of
from service.operations.listing import ledger, with_pace

POLL_SECONDS = 0.5
PAGE = 20
LATE_FENCES = 20
"""A node that lost a run may still write its last lines: so many fences before the newest are looked at again."""


async def blocks(settings: Settings, given: str, follow: bool) -> AsyncGenerator[Block | str]:
    """The blocks of a run, oldest first; at the end its state. With `follow` that is its final one.

    `given` is a run's id, how that begins, or a task, whose newest run is meant. Raises UnknownRun or UnknownTask.
    """
    logs.set_up("CRITICAL")
    async with ledger(settings) as connection:
        run = await run_of(connection, settings, given)
        assert connection is not None
        reader = Reader(connection, run)
        while True:
            state, fence = await _state(connection, run)  # before the lines: a final state comes with the last ones
            async for block in reader.new_blocks(fence):
                yield block
            if not follow or state in FINAL:
                yield state
                return
            await connection.rollback()  # the next look must see what was written since
            await asyncio.sleep(POLL_SECONDS)


async def looks(settings: Settings, given: str) -> AsyncGenerator[dict[str, Any]]:
    """A run's row, twice a second; the last one has a final state. `now` is the ledger's time, `rate` and `eta` its.

    `given` as in `blocks`, and so are the errors.
    """
    logs.set_up("CRITICAL")
    async with ledger(settings) as connection:
        run = await run_of(connection, settings, given)
        assert connection is not None
        while row := await look(connection, run):
            yield row
            if row["state"] in FINAL:
                return
            await connection.rollback()
            await asyncio.sleep(POLL_SECONDS)
        raise _deleted(run)


async def look(connection: AsyncConnection, run: str) -> dict[str, Any] | None:
    """The row as `looks` has it; None: there is none."""
    if (row := await run_rows.get(connection, run)) is None:
        return None
    now = await database_time.now_of(connection)
    return {**with_pace(row, now), "now": now}


async def _state(connection: AsyncConnection, run: str) -> tuple[str, int]:
    row = await run_rows.get(connection, run)
    if row is None:
        raise _deleted(run)
    return row["state"], row["fence"]


def _deleted(run: str) -> UnknownRun:
    return UnknownRun(f"the run {run} was deleted meanwhile")


@dataclass
class Reader:
    """Knows how far it has read under each fence, so that no block comes twice, and none is passed over."""

    connection: AsyncConnection
    run: str
    _next: dict[int, int] = field(default_factory=dict)
    _started: bool = False

    async def new_blocks(self, newest: int) -> AsyncIterator[Block]:
        """What was written since the last call. `newest` is the run's fence."""
        late = range(max(0, newest - LATE_FENCES), newest + 1)
        fences = list(late) if self._started else await run_logs.fences(self.connection, self.run)
        self._started = True
        for fence in fences:
            while found := await self._page(fence):
                for packed in found:
                    yield packed.unpacked()

    async def _page(self, fence: int) -> list[Packed]:
        found = await run_logs.page(self.connection, self.run, fence, self._next.get(fence, 0), PAGE)
        if found:
            self._next[fence] = found[-1].first_line + found[-1].lines
        return found
