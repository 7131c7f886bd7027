"""`batch show`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from batch_system import clock
from batch_system.cli import progress
from batch_system.cli.logs import text
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, RunOrTask
from batch_system.errors import InvalidSchedule
from batch_system.operations.runs import blocking
from batch_system.settings.pools import DEFAULT_POOL
from batch_system.words import dates_in_words, short, utc

if TYPE_CHECKING:
    from batch_system.operations.asking.results import (
        Attempt,
        Node,
        Parameter,
        PartShort,
        PartsOfRun,
        RunDetails,
    )
    from batch_system.operations.tasks.results import TaskAfter, TaskDetails
    from batch_system.verbs.following import Operations

Waits = dict[str, Any]
"""What a run waits for, if it waits (`waiting`: a Waiting), and the chain that it is in (`chain`: a
Chain).
"""

MOST_PARTS = 20
"""How many parts of a run are shown, at most."""

OF_SCHEDULES = ["cron", "except_on", "timezone", "valid_from", "valid_until"]


def show(run: RunOrTask, as_json: AsJson = False) -> None:
    """Show everything about a run, or about a task.

    If RUN is the id of a run, or at least 6 digits of its beginning or end, the command shows the
    times, attempts and error of the run, and the last lines of its log. If RUN is the name of a
    task, the command shows the schedule, policies, parameters, last runs and missed slots of the
    task.
    """
    from batch_system import console
    from batch_system.operations.asking.results import RunDetails
    from batch_system.verbs.runs import FindRunOrTask, ShowRun
    from batch_system.verbs.tasks import ShowTask

    async def work(operations: Operations) -> tuple[str, RunDetails | TaskDetails, Waits | None]:
        found = await operations(FindRunOrTask(given=run))
        if found.kind == "task":
            of_ledger = ShowTask.model_construct(name=found.name)  # another version may have it
            return found.kind, await operations(of_ledger), None
        details = await operations(ShowRun(run=found.name))
        return found.kind, details, await _waits(operations, details)

    kind, details, waits = ask(work, needs_tasks=False)
    if as_json:
        more = {
            name: value.model_dump(mode="json")
            for name, value in (waits or {}).items()
            if value is not None
        }
        console.show_json({"kind": kind, **details.model_dump(mode="json"), **more})
    elif isinstance(details, RunDetails):
        _show_run(details, waits or {})
    else:
        _show_task(details)


async def _waits(operations: Operations, run: RunDetails) -> Waits:
    """What the run waits for, and the chain that it is in."""
    from batch_system.verbs.runs import ShowBlocker, ShowChain

    is_waiting = run.state in ("waiting", "queued", "interrupted")
    waiting = await operations(ShowBlocker(run=run.id)) if is_waiting else None
    return {"waiting": waiting, "chain": await operations(ShowChain(run=run.id))}


def _show_run(run: RunDetails, waits: Waits) -> None:
    from batch_system import console
    from batch_system.words import kept_back_in_words

    waiting, chain = waits.get("waiting"), waits.get("chain")

    console.show_values(
        {
            "run": run.id,
            "task": run.task,
            "state": f"{run.state}: {run.reason}" if run.reason else run.state,
            "waits": blocking.sentences(waiting) if waiting is not None else None,
            "keeps back": (kept_back_in_words(chain.keeps_back) or None) if chain else None,
            "chain": blocking.line_of(chain, run.task, run.state) if chain is not None else None,
            "slot": _in_utc_and_zone(run.slot, run.timezone),
            "origin": run.origin
            + (f", requested by {run.requested_by}" if run.requested_by else ""),
            "parent": run.parent,
            "part": run.part,
            "params": _json(run.params),
            "result": _json(run.result),
            "progress": ", ".join(progress.words(run.model_dump(), clock.now())),
            "message": run.message,
            "attempt": run.attempt or None,
            "node": _node(run.node),
            "created": run.created_at,
            "started": _after(run.started_at, run.created_at, "waited"),
            "finished": _after(run.finished_at, run.started_at, "took"),
            "next attempt": run.due_at if run.state == "retrying" else None,
            "running for": _age_of_attempt(run),
        }
    )
    _show_attempts(run.attempts)
    if run.parts is not None:
        _show_parts(run.id, run.parts)
    if run.log:
        console.heading(f"Log (the last lines; `batch logs {run.id}` shows all)")
        for line in run.log:
            console.write(text(line.at, line.level, line.logger, line.text))


def _show_parts(run: str, parts: PartsOfRun) -> None:
    from batch_system import console

    states = ", ".join(f"{number:,} {state}" for state, number in sorted(parts.states.items()))
    shows = (
        f"; the first are those that failed, and the slowest ones; `batch runs --parent {run}` "
        "shows all"
    )
    console.heading(
        f"Parts ({parts.number:,}: {states}{shows if parts.number > MOST_PARTS else ''})"
    )
    rows = [
        {
            **part.model_dump(),
            "id": short(part.id),
            "took": _took(part),
            "progress": progress.brief(part.model_dump()),
        }
        for part in parts.parts[:MOST_PARTS]
    ]
    console.show(
        rows, ["part", "id", "state", "attempt", "took", "progress", "reason"], as_json=False
    )


def _took(part: PartShort) -> str | None:
    has_ended = part.started_at is not None and part.finished_at is not None
    return _seconds(part.started_at, part.finished_at) if has_ended else None


def _show_attempts(attempts: Sequence[Attempt]) -> None:
    from batch_system import console

    if not attempts:
        return
    console.heading("Attempts")
    rows = [
        {
            **attempt.model_dump(),
            "took": _seconds(attempt.started_at, attempt.ended_at),
            "error": _error(attempt.error),
        }
        for attempt in attempts
    ]
    console.show(rows, ["number", "outcome", "started_at", "took", "error"], as_json=False)
    error = attempts[-1].error
    if error:
        console.heading("Error of the last attempt")
        console.write(console.INDENT + console.message(error["traceback"].rstrip()))


def _show_task(task: TaskDetails) -> None:
    from batch_system import console
    from batch_system.operations.tasks.results import memory_in_words

    problem = (
        f"its file has been gone since {utc(task.removed_at)}"
        if task.removed_at
        else "its file can't be used here"
    )
    policies = {
        name: value for name, value in task.policies.items() if name not in ("pool", "memory")
    }
    console.show_values(
        {
            "task": task.name,
            "description": task.description,
            "source": task.source + ("" if task.is_loaded else f" ({problem})"),
            "schedule": f"{_written(task)}: {task.words}" if task.schedule else _no_schedule(task),
            "after": _after_in_words(task.after) if task.after else None,
            "chain": blocking.line_of(
                task.chain, task.name, task.runs[0].state if task.runs else None
            ),
            "paused": _pause(task),
            "next": [_in_utc_and_zone(slot.slot, task.timezone) for slot in task.next],
            "left out": dates_in_words(task.left_out),
            "policies": [f"{name} = {value}" for name, value in policies.items()]
            or "all have their defaults",
            "pool": task.pool if task.pool != DEFAULT_POOL else None,
            "memory": memory_in_words(task.memory),
            "owner": task.owner,
            "runbook": task.runbook,
            "muted": f"until {utc(task.muted_until)}" if task.muted_until else None,
            "parameters": [_parameter(parameter) for parameter in task.parameters or []],
            "first seen": task.first_seen_at,
            "last run": task.runs[0].id if task.runs else "none yet",
            "last success": task.last_success_at,
            "failing": _streak(task.failure_streak),
            "takes": _usual_duration(task.p50, task.p95),
        }
    )
    upcoming = [each.model_dump() for each in task.upcoming]
    _show_list("Upcoming", upcoming, ["at", "id", "requested_by"])
    runs = [
        {**run.model_dump(), "took": _seconds(run.started_at, run.finished_at)} for run in task.runs
    ]
    _show_list(
        "Last runs",
        runs,
        ["id", "slot", "origin", "state", "attempt", "started_at", "took", "reason"],
    )
    missed = [missed.model_dump() for missed in task.missed]
    _show_list("Missed", missed, ["first_slot", "last_slot", "count", "reason"])
    schedules = [span.model_dump() for span in task.schedules]
    _show_list("Present and past schedules", schedules, OF_SCHEDULES)


def _show_list(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    from batch_system import console

    if rows:
        console.heading(title)
        console.show(rows, columns, as_json=False)


def _written(task: TaskDetails) -> str:
    became = f"{task.given}, which became " if task.given else ""
    return f"{became}{task.schedule}"


def _no_schedule(task: TaskDetails) -> str:
    return "none any more" if task.schedules else "none: the task is started by hand"


def _after_in_words(after: TaskAfter) -> str:
    """What the runs of a task wait for, such as "extract: for a success, 24 h 00 min at most"."""
    end = "any end" if after.on == "end" else "a success"
    return f"{', '.join(after.tasks)}: for {end}, {progress.duration(after.within)} at most"


def _parameter(parameter: Parameter) -> str:
    kind = f": {parameter.type}" if parameter.type else ""
    if parameter.default is not None:
        return f"{parameter.name}{kind} = {parameter.default}"
    return f"{parameter.name}{kind}" + (" (required)" if parameter.required else "")


def _in_utc_and_zone(slot: datetime | None, timezone: str | None) -> str | None:
    """A slot in UTC, and in the zone of its task, if that is not UTC."""
    if slot is None:
        return None
    if timezone is None or timezone == "UTC":
        return utc(slot)
    from batch_system.batch.cron.zones import zone_of

    try:
        return f"{utc(slot)} ({slot.astimezone(zone_of(timezone)).isoformat(' ')} in {timezone})"
    except InvalidSchedule:  # a newer version of the service may know zones that this one does not
        return utc(slot)


def _node(node: Node | None) -> str | None:
    return f"process {node.pid} on {node.host} ({node.id})" if node else None


def _after(at: datetime | None, before: datetime | None, verb: str) -> str | None:
    """An instant, and the time since the instant `before`, such as `2026-11-25 16:18:45Z, waited
    0.00 s`.
    """
    if at is None:
        return None
    return utc(at) + (f", {verb} {_seconds(before, at)}" if before else "")


def _seconds(start: datetime | None, end: datetime | None) -> str | None:
    return f"{(end - start).total_seconds():.2f} s" if start and end else None


def _streak(failures: int) -> str | None:
    return f"{failures} failed runs since the last success" if failures > 1 else None


def _usual_duration(p50: float | None, p95: float | None) -> str | None:
    """How long the runs of a task usually take; None if no run has succeeded yet."""
    return (
        f"usually {p50:.2f} s, and 95 of 100 runs at most {p95:.2f} s"
        if p50 is not None and p95 is not None
        else None
    )


def _age_of_attempt(run: RunDetails) -> str | None:
    """How long the present attempt has run. None if the run is not running."""
    return _seconds(run.attempt_started_at, clock.now()) if run.state == "running" else None


def _error(error: dict[str, Any] | None) -> str | None:
    return f"{error['type']}: {error['message']}" if error else None


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _pause(task: TaskDetails) -> str | None:
    if task.paused_at is None:
        return None
    until = f", until {utc(task.paused_until)}" if task.paused_until is not None else ""
    return f"since {utc(task.paused_at)} by {task.paused_by}{until}"
