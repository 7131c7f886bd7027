"""`batch run` and `batch runs`."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, manage, progress, watch
from service.cli.opening import ask
from service.cli.options import AsJson, OfTask, TaskName, instant, instant_or_age, pairs, user, wait_for, whole
from service.errors import InvalidParameters

if TYPE_CHECKING:
    from service.cli.bar import Bar, Lines
    from service.operations.operations import Operations
    from service.operations.results import RunSummary, Started
    from service.operations.run_list import RunFilter
    from service.server.batch_service import BatchService

BAR_AFTER_SECONDS = 1.0
"""The bar is shown if the run takes longer than this."""


def run(
    name: TaskName,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="A parameter of run(), as name=value. May be given several times."),
    ] = None,
    slot: Annotated[
        str | None, typer.Option(help="The slot of the run: the instant for which it runs (ISO 8601); default: now.")
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Queue the run for a running service, and print its id.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="With --queue: show the log until the run ends.")] = False,
) -> None:
    """Run a task now in this process, record the run, and show its log.

    The exit code is 1 if the run does not succeed. The command works whether a service is running or not. With --queue
    the task does not run in this process: a running service executes it, after the waiting runs of the task.
    """
    at = instant(slot, "--slot") if slot is not None else None
    if queue:
        _queue(name, pairs(param or []), at, wait)
    elif wait:
        raise InvalidParameters("--wait needs --queue; without --queue, the command always waits for the run")
    else:
        _execute(name, pairs(param or []), at)


def _execute(name: str, parameters: dict[str, str], slot: datetime | None) -> None:
    import asyncio

    from service import console
    from service.cli import bar
    from service.logs import get_logger

    def log_line(row: Mapping[str, Any], text: str) -> None:
        get_logger("service.batch").info(text, run=row["id"])

    try:
        with bar.display(sys.stderr, log_line, states=False, after=BAR_AFTER_SECONDS) as display:
            row = wait_for(_run(name, parameters, slot, display))
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
    console.say(progress.ending(row))
    if row["result"] is not None:
        console.show_json(row["result"])
    raise SystemExit(0 if row["state"] == "succeeded" else 1)


def _queue(name: str, parameters: dict[str, str], slot: datetime | None, wait: bool) -> None:
    from service import console

    async def work(operations: Operations) -> tuple[Started, str | None]:
        started = await operations.runs.start(name, parameters, slot)
        return started, await manage.hint_if_unserved(operations, name)

    started, hint = ask(work)
    console.say(f"run {started.id} queued", flush=True)
    manage.warn(hint)
    if wait:
        watch.with_log(started.id)


def runs(
    task: OfTask = None,
    state: Annotated[
        list[str] | None,
        typer.Option(help="Show only runs in this state; may be repeated.", autocompletion=complete.states),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Show only runs created since this instant (ISO 8601), or within an age such as 2h or 7d."),
    ] = None,
    ended_since: Annotated[
        str | None, typer.Option(help="Show only runs that ended since this instant, or within an age.")
    ] = None,
    limit: Annotated[
        int, typer.Option(parser=whole(1, 100_000), metavar="NUMBER", help="The largest number of runs to show.")
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first.

    `batch show ID` shows everything about one of them.
    """
    from service import console
    from service.operations.run_list import RunFilter

    wanted = RunFilter.of(
        task=task,
        state=state or [],
        created_since=instant_or_age(since, "--since") if since is not None else None,
        ended_since=instant_or_age(ended_since, "--ended-since") if ended_since is not None else None,
    )
    listed = ask(lambda operations: _listed(operations, wanted, limit), log_level="WARNING")
    rows = [run.model_dump() for run in listed]
    columns = ["id", "task", "slot", "origin", "state", "attempt", "started_at", "finished_at", "progress", "reason"]
    console.show(rows if as_json else [{**row, "progress": progress.brief(row)} for row in rows], columns, as_json)


async def _listed(operations: Operations, wanted: RunFilter, limit: int) -> list[RunSummary]:
    """At most `limit` runs, page by page."""
    runs: list[RunSummary] = []
    after: str | None = None
    while len(runs) < limit:
        page = await operations.runs.list(wanted, limit - len(runs), after)
        runs += page.runs
        after = page.after
        if after is None:
            break
    return runs


async def _run(name: str, parameters: dict[str, str], slot: datetime | None, display: Bar | Lines) -> dict[str, Any]:
    import asyncio

    from service import logs as logging
    from service.batch.execution.run_here import ManualRun
    from service.batch.tasks.registry import TaskRegistry
    from service.config import get_settings
    from service.server.batch_service import BatchService

    settings = get_settings()
    logging.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT, display.log_stream)
    batch = BatchService(settings, fires=False)
    await batch.start()
    current_task = asyncio.current_task()
    assert current_task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current_task.cancel)
    try:
        manual = ManualRun(batch.ledger, batch.engine, TaskRegistry.get(name), batch.node.id)
        async with watch.displayed(batch.operations, manual.id, display), _drained(batch, settings.DRAIN_SECONDS):
            return await manual.execute(parameters, slot, requested_by=user())
    finally:
        await batch.stop()
        logging.flush()


@asynccontextmanager
async def _drained(batch: BatchService, seconds: float) -> AsyncIterator[None]:
    """If the block is cancelled, wait at most this many seconds for the end of the run, which is still displayed."""
    import asyncio

    from service import logs

    try:
        yield
    except asyncio.CancelledError:
        if batch.engine.running:
            text = (
                f"stopping: if the run does not end within {seconds:g} s, it is interrupted, and a service resumes it"
            )
            logs.get_logger("service.batch").info(text)
        await batch.drain()
        raise
