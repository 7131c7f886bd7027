"""`batch watch`, and what `batch run` has of it: following a run to its end."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from service.cli import logs, progress
from service.cli.opening import ask
from service.cli.options import RunOrTask, utc
from service.cli.progress import Row

if TYPE_CHECKING:
    import asyncio

    from service.cli.bar import Bar, Lines
    from service.operations.operations import Operations
    from service.operations.results import RunNow

T = TypeVar("T")


def watch(run: RunOrTask) -> None:
    """Follow a run to its end: how far it is, how fast, and how long it will take.

    RUN is a run's id, the first 6 or more digits of one, or a task's name: then its newest run is meant. In a terminal
    it is a bar; else a line when something has changed, every 10 seconds at most. The exit code is 0 when the run
    succeeded, and 1 when it ended otherwise. Ctrl-C leaves the run alone.
    """
    from service import console
    from service.cli import bar

    def tell(row: Row, text: str) -> None:
        console.say(f"{utc(row['now'])} {text}", flush=True)

    with bar.display(sys.stdout, tell) as shown:
        row = _wait_for(lambda operations: _see(operations.runs.follow(run), shown), shown)
    console.say(progress.told_end(row))
    raise SystemExit(0 if row["state"] == "succeeded" else 1)


def with_log(run: str) -> NoReturn:
    """Until the run ends: its log on stdout, how far it is on stderr.

    Who reads a pipe may write to the same terminal, and would tear the bar.
    """
    import asyncio

    from service import console
    from service.cli import bar

    def tell(row: Row, text: str) -> None:
        console.warn(f"{utc(row['now'])} {text}")

    async def follow(operations: Operations) -> str:
        seeing = asyncio.create_task(_see(operations.runs.follow(run), shown))
        try:
            return await logs.print_log(operations.runs.log(run, follow=True), write=shown.write)
        finally:
            await _end(seeing)

    lines = bar.Lines(tell, states=False)
    with bar.display(sys.stderr, tell) if sys.stdout.isatty() else lines as shown:
        state = _wait_for(follow, shown)
    raise SystemExit(0 if state == "succeeded" else 1)


@asynccontextmanager
async def seen(operations: Operations, run: str, shown: Bar | Lines) -> AsyncIterator[None]:
    """Show a run of this process in the block. A ledger that is away only leaves it as it was."""
    import asyncio

    watching = asyncio.create_task(_see_here(operations, run, shown))
    try:
        yield
    finally:
        await _end(watching)


async def _see_here(operations: Operations, run: str, shown: Bar | Lines) -> None:
    import asyncio

    from service.errors import DatabaseError
    from service.operations import run_log

    while True:
        with suppress(DatabaseError, OSError):
            now = await operations.runs.get(run)
            if now is not None:
                shown.see(now.model_dump())
        await asyncio.sleep(run_log.POLL_SECONDS)


async def _see(looks: AsyncGenerator[RunNow], shown: Bar | Lines) -> Row:
    row: dict[str, Any] = {}
    async with aclosing(looks) as opened:
        async for now in opened:
            row = now.model_dump()
            if now.finished_at is None:
                shown.see(row)
    return row


async def _end(watching: asyncio.Task[Any]) -> None:
    import asyncio

    watching.cancel()
    await asyncio.wait([watching])


def _wait_for(work: Callable[[Operations], Awaitable[T]], shown: Bar | Lines) -> T:
    from service import console

    try:
        return ask(work, needs_tasks=False)
    except KeyboardInterrupt:
        if shown.run is not None:
            run = shown.run["id"]
            console.warn(f"batch: the run goes on; `batch watch {run}` follows it again")
        raise SystemExit(130) from None
