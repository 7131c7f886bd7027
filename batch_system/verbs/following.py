"""Follows a run to its end, its log, or a bulk, by polling the ledger or a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

from batch_system.batch.ledger.states import FINAL
from batch_system.errors import BatchError, UnknownRun
from batch_system.operations.asking.results import Line, LogBlock
from batch_system.operations.runs.results import POLL_SECONDS
from batch_system.verbs.bulks import ShowBulk
from batch_system.verbs.runs import RunAsItIs, ShowLog

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context, Performs
    from batch_system.operations.asking.results import RunNow
    from batch_system.operations.bulks.results import Bulk
    from batch_system.operations.runs.results import LogPage

R = TypeVar("R")
LINES = 2_000
"""How many lines of a log are requested at once."""


class Operations(Protocol):
    """What carries out verbs: beside the ledger, or by asking a service."""

    @property
    def is_here(self) -> bool:
        """Whether the ledger is used directly."""

    @property
    def context(self) -> Context:
        """The context, for what is not a verb. Raises InvalidParameters for the operations of a
        remote service.
        """

    async def __call__(self, verb: Performs[R]) -> R:
        """Carry out a verb."""


async def follow(operations: Operations, run: str) -> AsyncGenerator[RunNow]:
    """Yield a run twice a second until it has a final state. `run` may be a task: its newest run is
    followed. Raises UnknownRun and UnknownTask.
    """
    now = await operations(RunAsItIs(run=run))
    while True:
        yield now
        if now.state in FINAL:
            return
        await asyncio.sleep(POLL_SECONDS)
        try:
            now = await operations(RunAsItIs(run=now.id))
        except BatchError as error:
            if error.kind != "not_found":
                raise
            raise UnknownRun(f"the run {now.id} was deleted meanwhile") from None


async def ended_within(operations: Operations, run: RunNow, seconds: float) -> RunNow:
    """A run when it has a final state, or as it is after `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for now in follow(operations, run.id):
                run = now
    return run


async def log(
    operations: Operations, run: str, follow: bool = False
) -> AsyncGenerator[LogBlock | str]:
    """The log of a run, the oldest lines first, and at the end its state. With `follow` it ends
    with the run's final state. `run` may be a task, which stands for its newest run.
    """
    if operations.is_here:
        from batch_system.operations.runs import run_log

        async for each in run_log.blocks(operations.context, run, follow):
            yield each
        return
    run = (await operations(RunAsItIs(run=run))).id
    after: str | None = None
    while True:
        # First, because a final state comes with the last lines.
        state = (await operations(RunAsItIs(run=run))).state
        while True:
            page = await operations(ShowLog(run=run, after=after, limit=LINES))
            after = page.after
            for block in _blocks(page):
                yield block
            if page.is_end:
                break
        if not follow or state in FINAL:
            yield state
            return
        await asyncio.sleep(POLL_SECONDS)


def _blocks(page: LogPage) -> list[LogBlock]:
    """The lines of a page, with one block for each attempt."""
    lines: dict[int, list[Line]] = {}
    for line in page.lines:
        lines.setdefault(line.attempt, []).append(Line.of(dict(line)))
    return [LogBlock(fence=0, attempt=attempt, lines=theirs) for attempt, theirs in lines.items()]


async def carried_out(operations: Operations, bulk: Bulk, report: Callable[[Bulk], None]) -> Bulk:
    """Wait until a bulk is carried out; beside the ledger, this process carries it out, unless a
    service does. `report`: called twice a second.
    """
    working = asyncio.ensure_future(_carry_out(operations, bulk.id))
    try:
        while bulk.finished_at is None:
            await asyncio.wait([working], timeout=POLL_SECONDS)
            bulk = await operations(ShowBulk(preview=bulk.id))
            report(bulk)
            if working.done() and bulk.finished_at is None:
                working.result()
                await asyncio.sleep(POLL_SECONDS)
                working = asyncio.ensure_future(_carry_out(operations, bulk.id))
        await working  # its last step finds nothing left to do
    finally:
        if not working.done():
            working.cancel()
            await asyncio.wait([working])
    return bulk


async def _carry_out(operations: Operations, id: str) -> None:
    if operations.is_here:
        from batch_system.operations.bulks import bulk

        await bulk.carry_out(operations.context, id)
