"""What keeps a task from running, apart from errors of its runs: a pause, no process that has it,
slots that were missed, a changed schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, select

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.counting import count
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger import maintenance, missed_ranges, pools, schedules
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.maintenance import MaintenanceWindow
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import MaintenanceKind, RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, nodes, runs
from batch_system.concurrency.offload import offload
from batch_system.errors import BatchError
from batch_system.escaping import cut
from batch_system.operations.system.nodes import living_services
from batch_system.operations.why import changes
from batch_system.operations.why.asked import Asked
from batch_system.operations.why.results import Reason
from batch_system.settings.pools import DEFAULT_POOL
from batch_system.words import utc

LATELY = timedelta(days=1)
"""Missed slots are told if they are not older."""
CHANGED = timedelta(days=7)
"""Changes of the schedule and the declaration are told if they are not older."""
BEFORE = timedelta(minutes=10)
"""What changed so shortly before an incident is named with it."""
MOST_NODES = 100
"""The process that had a task last is searched for among this many of the newest ones."""
MOST_RANGES = 5
MOST_CHANGES = 3
LONGEST_NOTE = 200
_ENDED = {
    RunState.SUCCEEDED: "succeeded",
    RunState.FAILED: "failed",
    RunState.CANCELLED: "was cancelled",
    RunState.SKIPPED: "was skipped",
}


async def of_task(asked: Asked, row: dict[str, Any]) -> list[Reason]:
    """All that keeps a task from running, or that has changed about it lately. `row`: of the
    task.
    """
    name = row["name"]
    reasons = await pause_of(asked, name, row)
    reasons += await unserved(asked, name, row)
    if row["muted_until"] is not None and row["muted_until"] > asked.now:
        by = row["muted_by"] or "somebody"
        text = f"{by} has muted it until {utc(row['muted_until'])}: nobody gets messages about it"
        reasons.append(Reason(kind="muted", text=text, at=row["muted_until"]))
    for window in await maintenance.open_windows(asked.connection, MaintenanceKind.MUTE):
        if window.lasts_at(asked.now) and window.is_about(row["pool"], row["tags"]):
            until = utc(window.ends_at) if window.ends_at is not None else "it is ended"
            text = f"{window.created_by} has muted {window.selection} until {until}"
            reasons.append(Reason(kind="muted", text=text, at=window.ends_at))
    reasons += await _missed(asked, name, row["paused_at"])
    return reasons + await _changed(asked, name)


async def pause_of(asked: Asked, name: str, row: dict[str, Any] | None = None) -> list[Reason]:
    """Who has paused a task, since when, why, and how many slots did not run since."""
    row = row or await task_rows.get(asked.connection, name)
    if row is None or row["paused_at"] is None:
        return []
    window = await _window_of(asked, row)
    if window is not None:
        text, why = f"{window.created_by} paused {window.selection}", window.note
    else:
        event = (
            await asked.connection.execute(audit.listing(1, task=name, action="task.pause"))
        ).first()
        text = f"{row['paused_by'] or 'somebody'} paused {name}"
        why = event.note if event is not None and not asked.hides(name) else None
    note = f": {cut(why, LONGEST_NOTE)}" if why else ""
    opened = await schedules.open_schedule(asked.connection, name)
    slots = ""
    until = min(asked.now, row["paused_until"] or asked.now)
    if opened is not None and opened.is_usable and until > row["paused_at"]:
        number = await offload(count, opened.schedule, row["paused_at"], until)
        slots = f"; since then {number:,} slot{'' if number == 1 else 's'} did not run"
    end = f", until {utc(row['paused_until'])}" if row["paused_until"] is not None else ""
    text = f"{text} at {utc(row['paused_at'])}{end}{note}{slots}"
    return [Reason(kind="paused", text=text, task=name, at=row["paused_at"])]


async def _window_of(asked: Asked, row: dict[str, Any]) -> MaintenanceWindow | None:
    """The maintenance window that has paused a task; None if a person has paused it alone."""
    opened = await maintenance.open_windows(asked.connection, MaintenanceKind.PAUSE)
    return next((each for each in opened if each.id == row["maintenance"]), None)


async def unserved(asked: Asked, name: str, row: dict[str, Any] | None = None) -> list[Reason]:
    """That no running process executes the runs of a task, and which one had it last."""
    row = row or await task_rows.get(asked.connection, name)
    if row is None:
        return []
    if row["removed_at"] is not None:
        text = f"the file of {name} is gone since {utc(row['removed_at'])}"
        return [Reason(kind="unserved", text=text, task=name, at=row["removed_at"])]
    living = await living_services(asked.connection, asked.context, asked.now)
    pool = row["pool"]
    if not living:
        text = "no service is running"
    elif not any(name in node.tasks for node in living):
        text = f"no running process has {name} loaded"
    elif pool != DEFAULT_POOL and name in (
        await pools.unclaimed(
            asked.connection, asked.now - timedelta(seconds=asked.context.lease_seconds)
        )
    ).get(pool, []):
        text = f"no running process of the pool {pool} has {name} loaded"
    else:
        return []
    return [Reason(kind="unserved", text=f"{text}{await _last_with(asked, name, pool)}", task=name)]


async def _last_with(asked: Asked, name: str, pool: str) -> str:
    """Which process had a task last, as the end of a sentence; empty if that is not known."""
    columns = (
        nodes.c.host,
        nodes.c.pid,
        nodes.c.tasks,
        nodes.c.pools,
        nodes.c.stopped_at,
        nodes.c.lost_at,
        nodes.c.seen_at,
    )
    query = select(*columns).order_by(nodes.c.id.desc()).limit(MOST_NODES)
    for node in await asked.connection.execute(query):
        is_of_pool = pool == DEFAULT_POOL or pool in (node.pools or [])
        if is_of_pool and isinstance(node.tasks, list) and name in node.tasks:
            how = "was lost" if node.lost_at is not None else "stopped"
            at = node.stopped_at or node.seen_at
            verb = how if node.stopped_at is not None else "was last seen"
            return f"; the last one, process {node.pid} on {node.host}, {verb} {utc(at)}"
    return ""


async def _missed(asked: Asked, name: str, paused_at: datetime | None) -> list[Reason]:
    """The slots that were missed lately, with the reason. Those of a pause that goes on are told
    with it.
    """
    found = await missed_ranges.of_task(asked.connection, name, MOST_RANGES)
    return [
        Reason(
            kind="missed",
            text=f"{row['count']:,} slot{'' if row['count'] == 1 else 's'} missed "
            f"({_span(row['first_slot'], row['last_slot'])}): {row['reason']}",
            at=row["last_slot"],
        )
        for row in found
        if row["last_slot"] >= asked.now - LATELY
        and row["left_at"] is None
        and (paused_at is None or row["last_slot"] <= paused_at)
    ]


def _span(first: datetime, last: datetime) -> str:
    return utc(first) if first == last else f"{utc(first)} to {utc(last)}"


async def _changed(asked: Asked, name: str) -> list[Reason]:
    """What has changed about the task itself in the last days, and its clock in the last day."""
    shown = ("schedule.change",) if asked.hides(name) else changes.OF_TASK
    query = audit.listing(MOST_CHANGES, since=asked.now - CHANGED, task=name)
    its = (await asked.connection.execute(query.where(events.c.action.in_(shown)))).all()
    reasons = _reasons(its)
    opened = await schedules.open_schedule(asked.connection, name)
    if opened is not None:
        reasons += _clock_change(opened.timezone, asked.now)
    return reasons


def _clock_change(timezone: str, now: datetime) -> list[Reason]:
    """That the clock of the schedule's zone has changed in the last day, or will in the next."""
    try:
        zone = zone_of(timezone)
    except BatchError:  # another version of the service may know the zone
        return []
    start = (now - LATELY).replace(microsecond=0)
    at = utc_offsets.change(zone, start, (now + LATELY).replace(microsecond=0))
    if at is None:
        return []
    step = utc_offsets.step(zone, at)
    way = "forward" if step > timedelta(0) else "back"
    minutes = int(abs(step).total_seconds()) // 60
    verb = "went" if at <= now else "will go"
    text = f"the clock of {timezone} {verb} {way} by {minutes} min at {utc(at)}"
    return [Reason(kind="changed", text=text, at=at)]


async def changed_before(asked: Asked, task: str | None, at: datetime) -> list[Reason]:
    """What changed shortly before an incident was opened."""
    events = await changes.between(asked.connection, task, at - BEFORE, at)
    causes = [event for event in events if event.action != "service.start"] or events
    return _reasons(causes[:MOST_CHANGES])


def _reasons(changed: Sequence[Row[Any]]) -> list[Reason]:
    return [
        Reason(kind="changed", text=f"at {utc(event.at)} {in_words(event)}", at=event.at)
        for event in changed
    ]


def in_words(event: Any) -> str:
    """A change as the end of a sentence that begins with its instant."""
    before = event.before if isinstance(event.before, dict) else {}
    after = event.after if isinstance(event.after, dict) else {}
    if event.action == "schedule.change":
        return f"its schedule was changed: {_cron(before)} -> {_cron(after)}"
    if event.action == "task.change":
        names = sorted({*before.get("policies", {}), *after.get("policies", {})})
        parts = [f"{n} {before['policies'].get(n)} -> {after['policies'].get(n)}" for n in names]
        if before.get("file") != after.get("file"):
            parts.append("its file has other content")
        return f"its declaration was changed: {cut(', '.join(parts), LONGEST_NOTE)}"
    if event.action == "service.deploy":
        versions = f"{before.get('application')} -> {after.get('application')}"
        return f"a new version was deployed: {versions}"
    if event.action == "settings.change":
        return f"settings were changed: {cut(event.target or '', LONGEST_NOTE)}"
    return f"a service started on {event.address or 'a host'}"


def _cron(schedule: dict[str, Any]) -> str:
    return f"{schedule.get('cron')} {schedule.get('timezone')}" if schedule else "none"


async def calm(asked: Asked, name: str) -> Reason:
    """What is known of a task with which nothing is wrong."""
    newest = run_rows(("id", "state", "finished_at"), runs.c.task == name, NO_PART_SQL)
    row = (await asked.connection.execute(newest.order_by(*NEWEST_FIRST).limit(1))).first()
    if row is None:
        return Reason(kind="good", text="it has not run yet")
    ended = _ENDED.get(row.state, f"is {row.state}")
    at = f" at {utc(row.finished_at)}" if row.finished_at is not None else ""
    return Reason(kind="good", text=f"its newest run {ended}{at}", run=row.id, at=row.finished_at)
