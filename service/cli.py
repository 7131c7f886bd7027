"""`batch …`, also `python -m service`: parses, calls, prints."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import re
import signal
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar
from zoneinfo import ZoneInfo

import typer
from sqlalchemy.exc import DBAPIError
from typer.exceptions import TyperException

from service import clock, console, listing, logs, server
from service.batch.manual import ManualRun
from service.batch.registry import TaskRegistry
from service.batch.schedule import schedule as schedule_of
from service.config import get_settings
from service.errors import BatchError, InvalidParameters
from service.host import BatchService

T = TypeVar("T")

logger = logs.get_logger("service.batch")

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
        code = cli(standalone_mode=False)
    except TyperException as error:
        code = _refuse(error.format_message())
    except BatchError as error:
        code = _refuse(error.message)
    except DBAPIError as error:
        code = _refuse(f"the database failed on the way: {str(error.orig).splitlines()[0]}")
    raise SystemExit(code)


def _refuse(message: str) -> int:
    if message:  # there is none where the help was shown instead
        print(f"batch: {message}", file=sys.stderr)
    return 2


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; default: PORT.")] = None,
) -> None:
    """Run the service: fire the tasks in TASKS_DIR and answer HTTP, until SIGTERM or Ctrl-C."""
    server.serve(get_settings(), host, port)


@cli.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks and when each fires next. Exit code 1 when there are files that can't be used."""
    found = _await(listing.tasks(get_settings()))
    good, broken = ([row for row in found if bool(row["error"]) is wrong] for wrong in (False, True))
    shown = ["name", "schedule", "timezone", "next_run_time", "paused", "source"]
    console.show(found if as_json else good, shown, as_json)
    for row in broken:
        print(f"batch: {row['source']} can't be used: {console.line(row['error'])}", file=sys.stderr)
    raise SystemExit(1 if broken else 0)


@cli.command()
def run(
    name: Annotated[str, typer.Argument(help="The task's name.")],
    param: Annotated[list[str] | None, typer.Option("--param", help="A parameter of run(), as name=value.")] = None,
    slot: Annotated[str | None, typer.Option(help="The instant to run it for (ISO 8601); default: now.")] = None,
) -> None:
    """Run a task here and now, record the run, show its log. Exit code 1 when it fails."""
    row = _await(_run(name, _pairs(param or []), _instant(slot, "--slot") if slot is not None else None))
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
    after = _since(since) if since is not None else None
    found = _await(listing.runs(get_settings(), task, state, after, limit))
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
    at = _instant(after, "--after", schedule.zone) if after is not None else clock.now()
    found: list[dict[str, Any]] = []
    while len(found) < n and (slot := schedule.next(at)) is not None:
        found.append({"slot": slot, "local": slot.astimezone(schedule.zone)})
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
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    try:
        manual = ManualRun(batch.ledger, batch.engine, TaskRegistry.get(name), batch.node.id)
        return await manual.execute(given, slot, requested_by=_user())
    except asyncio.CancelledError:
        if batch.engine.running:
            logger.info(f"stopping: the run has {settings.DRAIN_SECONDS:g} s to end, or is resumed by a service")
        raise
    finally:
        await batch.stop()
        logs.flush()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _pairs(given: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidParameters(f"--param {pair!r}: it takes name=value")
        if name in pairs:
            raise InvalidParameters(f"--param {name}: it is given twice; one value is allowed")
        pairs[name] = value
    return pairs


def _instant(text: str, option: str, zone: ZoneInfo | None = None) -> datetime:
    """ISO 8601; without an offset it is in `zone`, or UTC."""
    try:
        parsed = datetime.fromisoformat(text)
        instant = (parsed if parsed.tzinfo else parsed.replace(tzinfo=zone or UTC)).astimezone(UTC)
        if not 1900 < instant.year < 9000:  # every zone can show it
            raise ValueError(text)
        return instant
    except (ValueError, OverflowError):
        age = ", or an age such as 2h or 7d" if option == "--since" else ""
        raise InvalidParameters(
            f"{option} is {text!r}; allowed: ISO 8601, such as 2026-11-25T02:00 or 2026-11-25T02:00+09:00{age}"
        ) from None


def _since(text: str) -> datetime:
    age = re.fullmatch(r"(\d+)([smhd])", text)
    if age is None:
        return _instant(text, "--since")
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[age[2]]
    try:
        return clock.now() - timedelta(**{unit: int(age[1])})
    except OverflowError:
        raise InvalidParameters(f"--since is {text!r}; allowed: an age that lies after the year 1") from None
