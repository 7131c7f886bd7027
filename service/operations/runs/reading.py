"""Reads one run, with its attempts and the end of its log."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import attempts as attempt_rows
from service.batch.ledger import database_time, nodes, run_logs, schedules
from service.batch.ledger import parts as part_rows
from service.batch.ledger import runs as run_rows
from service.batch.ledger.parts import PartsGate, Tally
from service.batch.ledger.states import RunState
from service.errors import UnknownRun
from service.operations.asking.results import Attempt, Line, Node, PartShort, PartsOfRun, RunDetails

LAST_LINES = 20
MOST_PARTS = 200
"""How many parts of a run are listed with it, at most."""


async def details_of(
    connection: AsyncConnection, run_id: str, last_lines: int = LAST_LINES
) -> RunDetails:
    """The details of a run, with this many last lines of its log. Raises UnknownRun."""
    row = await row_of(connection, run_id)
    spans = await schedules.history(connection, row["task"])
    node = await nodes.get(connection, row["node"]) if row["node"] else None
    fields: dict[str, Any] = {
        "timezone": spans[-1]["timezone"] if spans else None,
        "node": Node.of(node) if node else None,
        "attempts": [
            Attempt.of(attempt) for attempt in await attempt_rows.of_run(connection, run_id)
        ],
        "log": [Line.of(vars(line)) for line in await run_logs.tail(connection, run_id, last_lines)]
        if last_lines
        else [],
        "parts": await _parts_of(connection, row),
    }
    if row["state"] == RunState.WAITING and (parts := fields["parts"]) is not None:
        fields |= {"count": parts.count, "total": parts.total}
    return RunDetails.at({**row, **fields}, await database_time.now_of(connection))


async def _parts_of(connection: AsyncConnection, row: dict[str, Any]) -> PartsOfRun | None:
    if row["gate"] not in tuple(PartsGate):
        return None
    tally = (await part_rows.tallies(connection, [row["id"]])).get(row["id"], Tally({}))
    listed = [
        PartShort.of(part._mapping)
        for part in await part_rows.of_run(connection, row["id"], MOST_PARTS)
    ]
    order = await part_rows.states_in_order(connection, row["id"], tally.number, MOST_PARTS)
    return PartsOfRun(
        number=tally.number,
        states=dict(tally.states),
        count=tally.count,
        total=tally.total,
        order=[str(state) for state in order],
        parts=listed,
    )


async def row_of(connection: AsyncConnection, run_id: str) -> dict[str, Any]:
    """The row of a run by column name. Raises UnknownRun."""
    row = await run_rows.get(connection, run_id)
    if row is None:
        raise UnknownRun(f"the run {run_id} was deleted just now")
    return row
