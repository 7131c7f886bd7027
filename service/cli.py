"""`batch …`, also `python -m service`: parses, calls, prints."""

from __future__ import annotations

import asyncio
import getpass
import json
import re
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar
from zoneinfo import ZoneInfo

import typer

from service import clock, console, listing, logs, server
from service.batch.manual import ManualRun
from service.batch.registry import TaskRegistry
from service.batch.schedule import schedule as schedule_of
from service.config import get_settings
from service.errors import BatchError, InvalidParameters
from service.host import BatchService

T = TypeVar("T")

cli = typer.Typer(
    name="batch",
    help="Batch System: tasks on schedule, every slot accounted for.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")]


def main() -> None:
    """The entry point: what was wrong is said in one line on stderr, with exit code 2."""
    try:
        cli()
    except BatchError as error:
        print(f"batch: {error.message}", file=sys.stderr)
        raise SystemExit(2) from None


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: PORT.")] = None,
) -> None:
    """Run the service: fire the tasks in TASKS_DIR and answer HTTP, until SIGTERM or Ctrl-C."""
    server.serve(get_settings(), host, port)


@cli.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks, when each fires next, and the files that can't be used."""
    found = _await(listing.tasks(get_settings()))
    console.show(found, ["name", "schedule", "timezone", "next_run_time", "paused", "source", "error"], as_json)


@cli.command()
def run(
    name: Annotated[str, typer.Argument(help="The task's name.")],
    param: Annotated[list[str] | None, typer.Option("--param", help="A parameter of run(), as name=value.")] = None,
    slot: Annotated[str | None, typer.Option(help="The instant to run it for (ISO 8601); default: now.")] = None,
) -> None:
    """Run a task here and now, record the run, show its log. Exit code 1 when it fails."""
    row = _await(_run(name, _pairs(param or []), _instant(slot, "--slot") if slot else None))
    took = console.duration(row["started_at"], row["finished_at"])
    print(f"run {row['id']} {row['state']}{took}" + (f": {row['reason']}" if row["reason"] else ""))
    if row["result"] is not None:
        print(json.dumps(row["result"], ensure_ascii=False))
    raise SystemExit(0 if row["state"] == "succeeded" else 1)


@cli.command()
def runs(
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    state: Annotated[str | None, typer.Option(help="Only in this state.")] = None,
    since: Annotated[str | None, typer.Option(help="Only made since: ISO 8601, or an age such as 2h or 7d.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    found = _await(listing.runs(get_settings(), task, state, _since(since) if since else None, limit))
    shown = ["id", "task", "slot", "origin", "state", "attempt", "started_at", "finished_at", "reason"]
    console.show(found, shown, as_json)


@cli.command("next")
def next_(
    expression: Annotated[str, typer.Argument(help="A cron expression, quoted.")],
    tz: Annotated[str, typer.Option(help="The time zone that it is read in.")] = "UTC",
    after: Annotated[str | None, typer.Option(help="Slots after this instant (ISO 8601); default: now.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=10_000, help="How many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show when a cron expression fires."""
    schedule = schedule_of(expression, tz)
    at = _instant(after, "--after", schedule.zone) if after else clock.now()
    found: list[dict[str, Any]] = []
    while len(found) < n and (slot := schedule.next(at)) is not None:
        found.append({"slot": slot, "local": slot.astimezone(schedule.zone).isoformat()})
        at = slot
    if not as_json:
        print(schedule.words)
    console.show(found, ["slot", "local"], as_json)


def _await(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def _run(name: str, given: dict[str, str], slot: datetime | None) -> dict[str, Any]:
    settings = get_settings()
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    batch = BatchService(settings, fires=False)
    await batch.start()
    try:
        manual = ManualRun(batch.ledger, batch.engine, TaskRegistry.get(name), batch.node.id)
        return await manual.execute(given, slot, requested_by=getpass.getuser())
    finally:
        await batch.stop()
        logs.flush()


def _pairs(given: list[str]) -> dict[str, str]:
    wrong = [pair for pair in given if "=" not in pair]
    if wrong:
        raise InvalidParameters(f"--param {wrong[0]!r}: it takes name=value")
    return dict(pair.split("=", 1) for pair in given)


def _instant(text: str, option: str, zone: ZoneInfo | None = None) -> datetime:
    """ISO 8601; without an offset it is in `zone`, or UTC."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidParameters(
            f"{option} is {text!r}; allowed: ISO 8601, such as 2026-11-25T02:00 or 2026-11-25T02:00+09:00"
        ) from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=zone or UTC)


def _since(text: str) -> datetime:
    if age := re.fullmatch(r"(\d+)([smhd])", text):
        unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[age[2]]
        return clock.now() - timedelta(**{unit: int(age[1])})
    return _instant(text, "--since")
