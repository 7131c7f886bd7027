"""Commands about runs."""

from __future__ import annotations

import asyncio
import json
import signal
from datetime import datetime
from typing import Annotated, Any

import typer

from service.cli import complete, logs, manage
from service.cli.options import AsJson, OfTask, TaskName, instant, instant_or_age, pairs, user, wait_for
from service.errors import InvalidParameters


def run(
    name: TaskName,
    param: Annotated[list[str] | None, typer.Option("--param", help="A parameter of run(), as name=value.")] = None,
    slot: Annotated[str | None, typer.Option(help="The instant to run it for (ISO 8601); default: now.")] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Leave it to a running service, and print the run's id.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="With --queue: show the log until the run ends.")] = False,
) -> None:
    """Run a task here and now, record the run, show its log.

    The exit code is 1 when it fails. It needs no service, and works beside one. With --queue it does not run here: a
    service takes it, after what the task has to do already.
    """
    at = instant(slot, "--slot") if slot is not None else None
    if queue:
        _queue(name, pairs(param or []), at, wait)
    elif wait:
        raise InvalidParameters("--wait goes with --queue; without it the run is waited for anyway")
    else:
        _execute(name, pairs(param or []), at)


def _execute(name: str, given: dict[str, str], slot: datetime | None) -> None:
    from service import console

    try:
        row = wait_for(_run(name, given, slot))
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
    took = console.duration(row["started_at"], row["finished_at"])
    print(f"run {row['id']} {row['state']}{took}" + (f": {row['reason']}" if row["reason"] else ""))
    if row["result"] is not None:
        print(json.dumps(row["result"], ensure_ascii=False))
    raise SystemExit(0 if row["state"] == "succeeded" else 1)


def _queue(name: str, given: dict[str, str], slot: datetime | None, wait: bool) -> None:
    from service import managing
    from service.config import get_settings

    run = wait_for(managing.queue(get_settings(), name, given, slot, user()))
    print(f"run {run} queued", flush=True)
    manage.warn_if_unserved(name)
    if wait:
        logs.logs(run, follow=True)


def runs(
    task: OfTask = None,
    state: Annotated[str | None, typer.Option(help="Only in this state.", autocompletion=complete.states)] = None,
    since: Annotated[str | None, typer.Option(help="Only made since: ISO 8601, or an age such as 2h or 7d.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first.

    `batch show ID` has all about one of them.
    """
    from service import console, listing
    from service.config import get_settings

    after = instant_or_age(since, "--since") if since is not None else None
    found = wait_for(listing.runs(get_settings(), task, state, after, limit))
    shown = ["id", "task", "slot", "origin", "state", "attempt", "started_at", "finished_at", "reason"]
    console.show(found, shown, as_json)


async def _run(name: str, given: dict[str, str], slot: datetime | None) -> dict[str, Any]:
    from service import logs as logging
    from service.batch.manual import ManualRun
    from service.batch.registry import TaskRegistry
    from service.config import get_settings
    from service.host import BatchService

    settings = get_settings()
    logging.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    batch = BatchService(settings, fires=False)
    await batch.start()
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    try:
        manual = ManualRun(batch.ledger, batch.engine, TaskRegistry.get(name), batch.node.id)
        return await manual.execute(given, slot, requested_by=user())
    except asyncio.CancelledError:
        if batch.engine.running:
            text = f"stopping: the run has {settings.DRAIN_SECONDS:g} s to end, or is resumed by a service"
            logging.get_logger("service.batch").info(text)
        raise
    finally:
        await batch.stop()
        logging.flush()
