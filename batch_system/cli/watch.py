"""`batch watch`, and the display of a run for `batch run`: both follow a run to its end."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from batch_system.cli import logs, progress
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, RunOrTask
from batch_system.cli.progress import Row
from batch_system.words import utc

if TYPE_CHECKING:
    import asyncio

    from batch_system.cli.bar import Bar, Lines
    from batch_system.operations.asking.results import RunNow
    from batch_system.verbs.following import Operations

T = TypeVar("T")


def watch(run: RunOrTask, as_json: AsJson = False) -> None:
    """Follow a run to its end, and show its progress, its rate and the remaining time.

    RUN is the id of a run, at least 6 digits of its beginning or end, or the name of a task, which
    stands for its newest run. With --json, each line is the run as a JSON object.

    In a terminal, the command shows a bar. Otherwise it prints a line at each change of state, and
    at most every 10 seconds after other changes. The exit code is 0 if the run succeeded, and 1 if
    it did not. Ctrl-C ends the command, but not the run.
    """
    from batch_system import console
    from batch_system.cli import bar
    from batch_system.verbs import following

    def print_line(row: Row, text: str) -> None:
        if as_json:
            console.write(console.json_of(row), flush=True)
        else:
            console.say(f"{utc(row['now'])} {text}", flush=True)

    with bar.Lines(print_line) if as_json else bar.display(sys.stdout, print_line) as display:
        row = _wait_for(
            lambda operations: _show(following.follow(operations, run), display), display
        )
    if as_json:
        console.show_json(row)
    else:
        console.say(progress.ending(row))
    raise SystemExit(0 if row["state"] == "succeeded" else 1)


def with_log(run: str, as_json: bool) -> NoReturn:
    """Print the log of a run on stdout and its progress on stderr, until the run ends; and then how
    it has ended.

    With `as_json` the log goes to stderr too, and stdout gets the run as JSON. The bar is shown
    only if stdout is a terminal too, because a program that reads stdout from a pipe may write to
    the same terminal, and that would damage the bar.
    """
    import asyncio

    from batch_system import console
    from batch_system.cli import bar
    from batch_system.verbs import following
    from batch_system.verbs.runs import RunAsItIs

    def print_line(row: Row, text: str) -> None:
        console.warn(f"{utc(row['now'])} {text}")

    def print_log_line(text: str) -> None:
        console.write(text, to_stderr=as_json, flush=True)

    async def follow(operations: Operations) -> RunNow:
        showing = asyncio.create_task(_show(following.follow(operations, run), display))
        try:
            write = print_log_line if as_json else display.write
            await logs.print_log(following.log(operations, run, follow=True), write=write)
            return await operations(RunAsItIs(run=run))
        finally:
            await _end(showing)

    lines = bar.Lines(print_line, states=False)
    with (
        bar.display(sys.stderr, print_line)
        if sys.stdout.isatty() and not as_json
        else lines as display
    ):
        now = _wait_for(follow, display)
    progress.print_end(now, as_json)
    raise SystemExit(0 if now.state == "succeeded" else 1)


@asynccontextmanager
async def displayed(operations: Operations, run: str, display: Bar | Lines) -> AsyncIterator[None]:
    """Display a run of this process in the block. While the ledger can't be reached, the display
    does not change.
    """
    import asyncio

    showing = asyncio.create_task(_show_run_here(operations, run, display))
    try:
        yield
    finally:
        await _end(showing)


async def _show_run_here(operations: Operations, run: str, display: Bar | Lines) -> None:
    import asyncio

    from batch_system.errors import DatabaseError
    from batch_system.operations.runs import read
    from batch_system.operations.runs.results import POLL_SECONDS

    while True:
        with suppress(DatabaseError, OSError):
            now = await read.get(operations.context, run)
            if now is not None:
                display.update_run(now.model_dump())
        await asyncio.sleep(POLL_SECONDS)


async def _show(states: AsyncGenerator[RunNow], display: Bar | Lines) -> Row:
    """Display a run until it ends, and return its last row."""
    row: dict[str, Any] = {}
    async with aclosing(states) as opened:
        async for now in opened:
            row = now.model_dump()
            if now.finished_at is None:
                display.update_run(row)
    return row


async def _end(showing: asyncio.Task[Any]) -> None:
    import asyncio

    showing.cancel()
    await asyncio.wait([showing])


def _wait_for(work: Callable[[Operations], Awaitable[T]], display: Bar | Lines) -> T:
    """Call `work` and return its result. After Ctrl-C, say how to follow the run again, and exit
    with code 130.
    """
    from batch_system import console

    try:
        return ask(work, needs_tasks=False)
    except KeyboardInterrupt:
        if display.run is not None:
            run = display.run["id"]
            console.warn(f"batch: the run continues; `batch watch {run}` follows it again")
        raise SystemExit(130) from None
