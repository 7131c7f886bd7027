"""`batch show`."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from service import clock
from service.cli import progress
from service.cli.logs import text
from service.cli.opening import ask
from service.cli.options import AsJson, RunOrTask, utc
from service.errors import InvalidSchedule

if TYPE_CHECKING:
    from service.operations.operations import Operations
    from service.operations.results import RunDetails, TaskDetails

Row = dict[str, Any]


def show(run: RunOrTask, as_json: AsJson = False) -> None:
    """Show everything about a run, or about a task.

    RUN is a run's id or the first 6 or more digits of one: its times, attempts, error, and the last lines of its log.
    Or it is a task's name: its schedule, policies, parameters, last runs, and the slots that it missed.
    """
    from service import console

    async def work(operations: Operations) -> tuple[str, RunDetails | TaskDetails]:
        kind, name = await operations.runs.find(run)
        return kind, await (operations.runs.show(name) if kind == "run" else operations.tasks.show(name))

    kind, details = ask(work, needs_tasks=False)
    row = details.model_dump()
    if as_json:
        console.show_json({"kind": kind, **row})
    else:
        (_show_run if kind == "run" else _show_task)(row)


def _show_run(row: Row) -> None:
    from service import console

    console.show_values(
        {
            "run": row["id"],
            "task": row["task"],
            "state": f"{row['state']}: {row['reason']}" if row["reason"] else row["state"],
            "slot": _both(row["slot"], row["timezone"]),
            "origin": row["origin"] + (f", asked for by {row['requested_by']}" if row["requested_by"] else ""),
            "parent": row["parent"],
            "params": _json(row["params"]),
            "result": _json(row["result"]),
            "progress": ", ".join(progress.words(row, clock.now())),
            "message": row["message"],
            "attempt": row["attempt"] or None,
            "node": _node(row["node"]),
            "created": row["created_at"],
            "started": _after(row["started_at"], row["created_at"], "waited"),
            "finished": _after(row["finished_at"], row["started_at"], "took"),
            "next try": row["due_at"] if row["state"] == "retrying" else None,
            "so far": _so_far(row),
        }
    )
    _show_attempts(row["attempts"])
    if row["log"]:
        console.heading(f"Log (the last lines; `batch logs {row['id']}` shows all)")
        for line in row["log"]:
            console.write(text(line["at"], line["level"], line["logger"], line["text"]))


def _show_attempts(attempts: list[Row]) -> None:
    from service import console

    if not attempts:
        return
    console.heading("Attempts")
    rows = [{**a, "took": _seconds(a["started_at"], a["ended_at"]), "error": _error(a["error"])} for a in attempts]
    console.show(rows, ["number", "outcome", "started_at", "took", "error"], as_json=False)
    last = attempts[-1]["error"]
    if last:
        console.heading("Error of the last attempt")
        console.write(console.INDENT + console.message(last["traceback"].rstrip()))


def _show_task(row: Row) -> None:
    from service import console

    gone = f"its file is gone since {utc(row['removed_at'])}" if row["removed_at"] else "its file can't be used here"
    paused = f"since {utc(row['paused_at'])} by {row['paused_by']}" if row["paused_at"] else None
    console.show_values(
        {
            "task": row["name"],
            "description": row["description"],
            "source": row["source"] + ("" if row["is_loaded"] else f" ({gone})"),
            "schedule": f"{row['schedule']}: {row['words']}" if row["schedule"] else _no_schedule(row),
            "paused": paused,
            "next": [_both(slot["slot"], row["timezone"]) for slot in row["next"]],
            "policies": [f"{name} = {value}" for name, value in row["policies"].items()] or "as by default",
            "parameters": [_parameter(parameter) for parameter in row["parameters"] or []],
            "first seen": row["first_seen_at"],
            "last run": row["runs"][0]["id"] if row["runs"] else "none yet",
        }
    )
    listed = {
        "Last runs": (row["runs"], ["id", "slot", "origin", "state", "attempt", "started_at", "took", "reason"]),
        "Missed": (row["missed"], ["first_slot", "last_slot", "count", "reason"]),
        "Schedules it has had": (row["schedules"], ["cron", "timezone", "valid_from", "valid_until"]),
    }
    for title, (rows, columns) in listed.items():
        if rows:
            console.heading(title)
            timed = [{**r, "took": _seconds(r.get("started_at"), r.get("finished_at"))} for r in rows]
            console.show(timed, columns, as_json=False)


def _no_schedule(row: Row) -> str:
    return "none any more" if row["schedules"] else "only by hand"


def _parameter(parameter: Row) -> str:
    kind = f": {parameter['type']}" if parameter["type"] else ""
    if parameter["default"] is not None:
        return f"{parameter['name']}{kind} = {parameter['default']}"
    return f"{parameter['name']}{kind}" + (" (has to be given)" if parameter["required"] else "")


def _both(slot: datetime | None, timezone: str | None) -> str | None:
    """In UTC, and in the task's zone where that is another."""
    if slot is None:
        return None
    if timezone is None or timezone == "UTC":
        return utc(slot)
    from service.batch.cron.zones import zone_of

    try:
        return f"{utc(slot)} ({slot.astimezone(zone_of(timezone)).isoformat(' ')} in {timezone})"
    except InvalidSchedule:  # another version's
        return utc(slot)


def _node(node: Row | None) -> str | None:
    return f"process {node['pid']} on {node['host']} ({node['id']})" if node else None


def _after(at: datetime | None, before: datetime | None, word: str) -> str | None:
    if at is None:
        return None
    return utc(at) + (f", {word} {_seconds(before, at)}" if before else "")


def _seconds(start: datetime | None, end: datetime | None) -> str | None:
    return f"{(end - start).total_seconds():.2f} s" if start and end else None


def _so_far(row: Row) -> str | None:
    """How long the attempt that is going on has run."""
    return _seconds(row["attempt_started_at"], clock.now()) if row["state"] == "running" else None


def _error(error: Row | None) -> str | None:
    return f"{error['type']}: {error['message']}" if error else None


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
