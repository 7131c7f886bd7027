"""Why a run, a task or an incident is as it is: reads the ledger in one transaction, and answers in
sentences.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import chains
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.incidents import incidents
from batch_system.batch.ledger.incidents.tables import OF_RUNS_SQL
from batch_system.batch.ledger.incidents.tables import incidents as incidents_table
from batch_system.batch.ledger.states import (
    CLOSE_BY_THEMSELVES,
    FINAL,
    OF_RUNS,
    IncidentKind,
    RunState,
)
from batch_system.batch.ledger.tables import runs
from batch_system.errors import UnknownTask
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import KeptBack
from batch_system.operations.incidents import open_failures
from batch_system.operations.incidents.read import find
from batch_system.operations.people.redacting import SECRET_TAG
from batch_system.operations.runs import quarantine
from batch_system.operations.runs.read import row_of, run_of
from batch_system.operations.why import commands, compared, comparing, run_states, standing
from batch_system.operations.why.asked import Asked, first_line_of
from batch_system.operations.why.results import Comparison, Reason, Why
from batch_system.words import INCIDENTS, short, utc

MOST_INCIDENTS = 100
"""The incident of a run is searched for among this many of the newest ones with its error."""
_HIDDEN = Reason(
    kind="hidden", text=f"the task has the tag {SECRET_TAG}, so a viewer sees only states and times"
)


async def of_run(context: Context, given: str) -> Why:
    """Why a run is in its state, and, if it has failed, what differs from the last good one. Raises
    UnknownRun and UnknownTask.
    """
    run = await run_of(context, given)
    async with context.databases.reading() as connection:
        assert connection is not None
        asked = await Asked.of(connection, context)
        row = await row_of(connection, run)
        return await _of_run(asked, row)


async def of_task(context: Context, name: str) -> Why:
    """Why a task fails or does not run: its open incidents first, then what holds it up. Raises
    UnknownTask.
    """
    async with context.databases.reading() as connection:
        row = await task_rows.get(connection, name) if connection is not None else None
        if connection is None or row is None:
            raise UnknownTask(f"the ledger knows no task {echoed(name)}")
        asked = await Asked.of(connection, context)
        return await _of_task(asked, row)


async def of_incident(context: Context, incident: str) -> Why:
    """Why an incident was opened, and what differs from the last good run before it. Raises
    UnknownIncident.
    """
    async with context.databases.reading() as connection:
        row = await find(connection, incident)
        assert connection is not None
        asked = await Asked.of(connection, context)
        return await _of_incident(asked, row)


async def _of_run(asked: Asked, row: dict[str, Any]) -> Why:
    state, task = row["state"], row["task"]
    of = f"slot {utc(row['slot'])}" if row["slot"] is not None else f"made {utc(row['created_at'])}"
    verdict = f"run {short(row['id'])} of {task}, {of}: {state}"
    attempts = row["attempt"] - row["attempts_before"]
    if state == RunState.FAILED and attempts > 1:
        verdict += f" after {attempts:,} attempts"
    if asked.hides(task):
        return Why(kind="run", id=row["id"], task=task, verdict=verdict, reasons=[_HIDDEN])
    found = row["fingerprint"]  # it stays when the run is retried
    if found is not None and state in (RunState.FAILED, RunState.SUCCEEDED):
        return await _of_failure(asked, row, verdict)
    reasons = await run_states.of_run(asked, row)
    incident = await _incident_of(asked.connection, row) if found is not None else None
    return Why(
        kind="run",
        id=row["id"],
        task=task,
        verdict=verdict,
        incident=incident.id if incident is not None else None,
        reasons=reasons,
        keeps_back=await _kept_back(asked.connection, row["id"]) if state in FINAL else (),
        next=commands.for_run(row, reasons),
    )


async def _of_failure(asked: Asked, row: dict[str, Any], verdict: str) -> Why:
    """A run with which something was wrong: it failed, or ended otherwise with a finding."""
    connection, task, run = asked.connection, row["task"], row["id"]
    incident = await _incident_of(connection, row)
    first = await _first_failure(connection, incident, row)
    reasons = await _recurrence(asked, incident, first)
    reasons += await _endings(asked, row)
    comparison, good = await _compared(asked, task, first, run)
    reasons.append(good)
    return Why(
        kind="run",
        id=run,
        task=task,
        verdict=verdict,
        error=first_line_of(row["reason"]),
        incident=incident.id if incident is not None else None,
        reasons=reasons,
        comparison=comparison,
        keeps_back=await _kept_back(connection, run),
        next=commands.for_run(row, reasons),
    )


async def _endings(asked: Asked, row: dict[str, Any]) -> list[Reason]:
    """What has become of a failure, and the items that it has set aside."""
    reasons = []
    left = await quarantine.left_of(asked.context.databases, [row["id"]])
    number = left.get(row["id"], 0)
    if number:
        items = "1 item that failed was" if number == 1 else f"{number:,} items that failed were"
        text = f"{items} set aside, and {'waits' if number == 1 else 'wait'} in quarantine"
        reasons.append(Reason(kind="quarantine", text=text, at=row["finished_at"]))
    if row["made_good_at"] is not None:
        by = row["made_good_by"]
        itself = by is None or by == row["id"]
        text = "it was made good by " + ("its own retry" if itself else f"run {short(by)}")
        reasons.append(Reason(kind="made_good", text=text, run=by, at=row["made_good_at"]))
    return reasons


async def _incident_of(connection: AsyncConnection, row: dict[str, Any]) -> Row[Any] | None:
    """The incident of a run's error: the one with which the run was acknowledged, or the one that
    was open when it had failed.
    """
    theirs = (
        incidents_table.c.task == row["task"],
        incidents_table.c.fingerprint.in_([row["fingerprint"], incidents.MORE]),
        text(OF_RUNS_SQL),
    )
    newest = select(incidents_table).where(*theirs).order_by(incidents_table.c.opened_at.desc())
    found = (await connection.execute(newest.limit(MOST_INCIDENTS))).all()[::-1]
    own = [each for each in found if each.fingerprint == row["fingerprint"]] or found
    # It is closed after its last run has ended. A run that was made good may have ended later.
    at = row["created_at"] if row["made_good_at"] is not None else row["finished_at"]
    then = (e for e in own if e.closed_at is None or e.closed_at >= (at or row["created_at"]))
    named = (each for each in found if each.id == row["acknowledged"])
    return next(named, None) or next(then, None)


async def _first_failure(
    connection: AsyncConnection, incident: Row[Any] | None, row: dict[str, Any]
) -> datetime:
    """When the first run was made that failed like this one."""
    made: datetime = row["created_at"]
    if incident is None or incident.first_run is None:
        return made
    query = select(runs.c.created_at).where(runs.c.id == incident.first_run)
    first: datetime = (await connection.execute(query)).scalar() or incident.opened_at
    return min(first, made)


async def _recurrence(asked: Asked, incident: Row[Any] | None, first: datetime) -> list[Reason]:
    """How often it has happened, in how many tasks, and who takes care of it."""
    if incident is None:
        return []
    number = incident._mapping["count"]
    reasons = []
    if number > 1:
        like = "with further errors" if incident.fingerprint == incidents.MORE else "like this"
        text = f"{number:,} runs have failed {like} since {utc(first)}"
        reasons.append(Reason(kind="recurs", text=text, at=first))
    together = await open_failures.one_problem(asked.connection, incident)
    seen = sum(not asked.hides(each.task) for each in together)
    if seen > 1:
        text = f"{seen:,} tasks have failed with this error, beginning within ten minutes"
        reasons.append(Reason(kind="recurs", text=text, at=first))
    if incident.acknowledged_at is not None:
        note = f": {first_line_of(incident.note)}" if incident.note else ""
        text = f"{incident.acknowledged_by} has acknowledged it{note}"
        reasons.append(Reason(kind="acknowledged", text=text, at=incident.acknowledged_at))
    return reasons


async def _compared(
    asked: Asked, task: str, first: datetime, bad: str
) -> tuple[Comparison | None, Reason]:
    """What differs between the last good run before the first failure and a bad one, and a sentence
    about the good one.
    """
    good = await compared.last_good(asked.connection, task, first)
    if good is None:
        text = f"no success of {task} before it is known"
        return None, Reason(kind="good", text=text)
    redaction = asked.context.redaction
    found = await comparing.compare(asked.connection, good, bad, redaction, asked.now)
    if found is None:
        return None, Reason(kind="good", text="the last good run was deleted", run=good)
    at = found.good.slot or found.good.created_at
    text = f"the last good run is {short(good)}, {utc(at)}"
    return found, Reason(kind="good", text=text, run=good, at=at)


async def _mended(asked: Asked, incident: Row[Any]) -> Comparison | None:
    """The last bad run of an incident beside the run that made it good; None if none did."""
    columns = (runs.c.id, runs.c.made_good_at, runs.c.made_good_by)
    query = select(*columns).where(runs.c.id == incident.newest_run)
    bad = (await asked.connection.execute(query)).first()
    if bad is None or bad.made_good_at is None:
        return None
    redaction, good = asked.context.redaction, bad.made_good_by or bad.id
    return await comparing.compare_mended(asked.connection, bad.id, good, redaction, asked.now)


async def _kept_back(connection: AsyncConnection, run: str) -> list[KeptBack]:
    return [KeptBack(**vars(each)) for each in await chains.kept_back_by_run(connection, run)]


async def _of_task(asked: Asked, row: dict[str, Any]) -> Why:
    connection, name = asked.connection, row["name"]
    opened = [each for each in await incidents.are_open(connection) if each.task == name]
    failing = [each for each in opened if each.kind in OF_RUNS]
    reasons = [_of_open(each, asked.hides(name)) for each in opened]
    reasons += await standing.of_task(asked, row)
    newest = max(failing, key=lambda each: each.last_at, default=None)
    more: dict[str, Any] = {}
    if newest is not None and not asked.hides(name):
        failed = await _failure_of(connection, newest)
        if failed is not None:
            first = await _first_failure(connection, newest, failed)
            comparison, good = await _compared(asked, name, first, failed["id"])
            reasons.append(good)
            more = {"comparison": comparison, "error": first_line_of(newest.text)}
            more["keeps_back"] = await _kept_back(connection, failed["id"])
    return Why(
        kind="task",
        id=name,
        task=name,
        verdict=_verdict_on(row, opened, reasons),
        incident=newest.id if newest is not None else None,
        reasons=reasons or [await standing.calm(asked, name)],
        next=commands.for_task(name, opened, reasons),
        **more,
    )


def _of_open(incident: Row[Any], is_hidden: bool) -> Reason:
    """An open incident as a sentence."""
    number = incident._mapping["count"]
    times = f", {number:,} times" if number > 1 else ""
    text = "" if is_hidden or not incident.text else f": {first_line_of(incident.text)}"
    what = INCIDENTS[incident.kind].heading
    said = f"{what[0].lower()}{what[1:]} since {utc(incident.opened_at)}{times}{text}"
    return Reason(kind="incident", text=said, run=incident.newest_run, at=incident.opened_at)


def _verdict_on(
    row: dict[str, Any], opened: Collection[Row[Any]], reasons: Sequence[Reason]
) -> str:
    name = row["name"]
    failing = [each for each in opened if each.kind == IncidentKind.FAILED]
    if failing:
        return f"{name} has been failing since {utc(min(each.opened_at for each in failing))}"
    kinds = {reason.kind for reason in reasons}
    if "paused" in kinds:
        return f"{name} is paused"
    if "unserved" in kinds:
        return f"{name} can't run"
    if any(e.acknowledged_at is None and e.kind not in CLOSE_BY_THEMSELVES for e in opened):
        return f"{name} needs a person"
    if "waits" in kinds:
        return f"{name} waits"
    return f"nothing is wrong with {name} now"


async def _of_incident(asked: Asked, row: Row[Any]) -> Why:
    connection, task = asked.connection, row.task or None
    what = INCIDENTS[row.kind].message.format(task=task or "a task")
    since = f"since {utc(row.opened_at)}"
    over = f", until {utc(row.closed_at)}" if row.closed_at is not None else ""
    number = row._mapping["count"]
    verdict = f"{what}{f', {number:,} times' if number > 1 else ''} {since}{over}"
    if asked.hides(task):
        return Why(kind="incident", id=row.id, task=task, verdict=verdict, reasons=[_HIDDEN])
    reasons: list[Reason] = []
    more: dict[str, Any] = {}
    failed = await _failure_of(connection, row, is_first=True) if row.kind in OF_RUNS else None
    if failed is not None and failed["state"] == RunState.SKIPPED:
        reasons += await run_states.skipped(connection, failed)
    elif failed is not None:
        first = failed["created_at"]
        reasons += await _recurrence(asked, row, first)
        comparison, good = await _compared(asked, row.task, first, failed["id"])
        reasons.append(good)
        more = {
            "comparison": comparison,
            "mended": await _mended(asked, row) if row.closed_at is not None else None,
            "keeps_back": await _kept_back(connection, row.newest_run or failed["id"]),
        }
    else:
        reasons += await standing.changed_before(asked, task, row.opened_at)
        its = await task_rows.get(connection, task) if task is not None else None
        reasons += await standing.of_task(asked, its) if its is not None else []
    return Why(
        kind="incident",
        id=row.id,
        task=task,
        verdict=verdict,
        error=first_line_of(row.text),
        incident=row.id,
        reasons=reasons,
        next=commands.for_incident(row),
        **more,
    )


async def _failure_of(
    connection: AsyncConnection, incident: Row[Any], is_first: bool = False
) -> dict[str, Any] | None:
    """The first or the newest run of an incident; None if it was deleted."""
    wanted = incident.first_run if is_first else incident.newest_run
    for run in (wanted, incident.newest_run, incident.first_run):
        if run is not None:
            row = (await connection.execute(select(runs).where(runs.c.id == run))).mappings()
            if (found := row.first()) is not None:
                return dict(found)
    return None
