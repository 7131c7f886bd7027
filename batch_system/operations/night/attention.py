"""What needs a person: failed runs that are neither made good nor acknowledged, and what else is
wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.chunks import quarantine
from batch_system.batch.incidents import problem as one_error
from batch_system.batch.incidents.watched import NOBODY, Answering
from batch_system.batch.ledger import chains, json_rows
from batch_system.batch.ledger.incidents import incidents
from batch_system.batch.ledger.incidents.tables import fingerprints
from batch_system.batch.ledger.incidents.tables import incidents as incidents_table
from batch_system.batch.ledger.states import OF_RUNS, IncidentKind
from batch_system.batch.ledger.tables import runs
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import is_missing_file
from batch_system.operations.asking.results import KeptBack
from batch_system.operations.incidents import open_failures
from batch_system.operations.night import details
from batch_system.operations.night.results import DealtWith, Need
from batch_system.operations.runs.quarantine import has_table

DETAILED = 20
"""Needs read in detail; the rest are only counted."""
MOST_OTHERS = 20
"""At most this many other tasks with the same error are named."""
MOST_ITEMS = 10_000
"""Items in quarantine are counted up to this number."""
_OF_FIRING = (IncidentKind.CLOCK, IncidentKind.UNFIRED, IncidentKind.NODE)
_KINDS = (
    IncidentKind.SILENT,
    IncidentKind.DEADLINE,
    IncidentKind.FILES,
    IncidentKind.PAUSED,
    IncidentKind.POOL,
    IncidentKind.LIMIT,
    *_OF_FIRING,
)
"""Kinds of incidents that need a person besides failed runs and alarms."""
_failure, _success = runs.alias("failure"), runs.alias("success")


class InNeed(NamedTuple):
    """What needs a person, and whose tasks have not been looked up yet.

    `groups`: the failed runs that are open, by task and error; `by_key`: their incidents. `others`:
    open incidents besides these and alarms that nobody has acknowledged. `quarantined`: how many
    items wait in quarantine, by task. `kinds`: of all open incidents besides those of runs.
    """

    groups: Sequence[open_failures.Group]
    by_key: open_failures.ByKey
    others: Sequence[Row[Any]]
    quarantined: Counter[str]
    kinds: Set[str]

    @property
    def tasks(self) -> set[str]:
        """The names of the tasks."""
        of_others = {_task_of(row) for row in self.others}
        return {*(group.task for group in self.groups), *filter(None, of_others), *self.quarantined}


async def in_need(connection: AsyncConnection, quarantined: Counter[str]) -> InNeed:
    """What needs a person, without details."""
    opened = await incidents.are_open(connection, (*OF_RUNS, *_KINDS))
    by_key = open_failures.by_key(opened)
    groups = await open_failures.groups(connection, by_key)
    rest = [row for row in opened if row.kind not in OF_RUNS]
    others = [row for row in rest if row.acknowledged_at is None]
    return InNeed(groups, by_key, others, quarantined, frozenset(row.kind for row in rest))


async def of_runs(
    connection: AsyncConnection,
    found: InNeed,
    answering: Mapping[str, Answering],
    hidden: frozenset[str],
) -> list[Need]:
    """The failed runs that are open, by task and error: those that still fail come first, then
    those with the most runs.
    """
    groups, by_key = found.groups, found.by_key
    seen = await _first_seen(connection, groups)
    needs = [
        _need(group, by_key, seen, answering.get(group.task, NOBODY), hidden) for group in groups
    ]
    tasks_by_error: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        tasks_by_error[group.fingerprint].append(group.task)
    needs.sort(key=lambda need: (-need.open, need.task or ""))
    detailed = await details.completed(connection, needs[:DETAILED], hidden)
    detailed = [_also_in(need, tasks_by_error[need.fingerprint or ""], hidden) for need in detailed]
    detailed = await _with_kept_back(connection, detailed)
    shown = [_seen_by_the_caller(need, hidden) for need in (*detailed, *needs[DETAILED:])]
    known = {row.id: (one_error.key_in(row.details), row.opened_at) for row in by_key.values()}
    alone: tuple[None, None] = (None, None)
    together = one_error.groups(
        shown, lambda need: alone if need.task in hidden else known.get(need.incident or "", alone)
    )
    one = [_one_problem(group) if len(group) > 1 else group[0] for group in together]
    return sorted(one, key=lambda need: need.succeeded_since is not None)


def _one_problem(group: Sequence[Need]) -> Need:
    """Several tasks that failed together with one error, as one row."""
    newest = max(group, key=lambda need: need.last_failed or datetime.min.replace(tzinfo=UTC))
    return newest.model_copy(
        update={
            "task": None,
            "subject": f"{len(group):,} tasks",
            "incident": None,
            "fingerprint": None,
            "open": sum(need.open for need in group),
            "retrying": sum(need.retrying for need in group),
            "failing_since": min(
                (need.failing_since for need in group if need.failing_since), default=None
            ),
            "first_seen": min((need.first_seen for need in group if need.first_seen), default=None),
            "owner": ", ".join(sorted({need.owner for need in group if need.owner})) or None,
            "also_in": (),
            "after": None,
            "keeps_back": (),
            "tasks": sorted(need.task for need in group if need.task),
            "incidents": [need.incident for need in group if need.incident],
        }
    )


async def _with_kept_back(connection: AsyncConnection, needs: Sequence[Need]) -> list[Need]:
    """The needs, completed with the runs that wait for a success of their failed runs."""
    errors = [(n.task or "", n.fingerprint or "") for n in needs if n.kind == IncidentKind.FAILED]
    kept = await chains.kept_back_by_errors(connection, errors)
    shown = {error: [KeptBack(**vars(each)) for each in rows] for error, rows in kept.items()}
    return [
        n.model_copy(update={"keeps_back": shown.get((n.task or "", n.fingerprint or ""), ())})
        for n in needs
    ]


def _also_in(need: Need, with_it: Sequence[str], hidden: frozenset[str]) -> Need:
    """The need, completed with the other tasks that have the same error. Words such as `empty` are
    not errors that tasks can share.

    Hidden tasks are left out: sharing an error with another task would reveal what their error is.
    """
    is_error = need.fingerprint is not None and ":" in need.fingerprint and need.task not in hidden
    others = sorted(name for name in with_it if name != need.task and name not in hidden)[
        :MOST_OTHERS
    ]
    return need.model_copy(update={"also_in": others}) if is_error and others else need


def _seen_by_the_caller(need: Need, hidden: frozenset[str]) -> Need:
    """The need, without the fingerprint of a hidden task, which would reveal which other tasks have
    its error.
    """
    return need.model_copy(update={"fingerprint": None}) if need.task in hidden else need


def _need(
    group: open_failures.Group,
    by_key: Mapping[tuple[str, str], Row[Any]],
    seen: Mapping[tuple[str, str], datetime],
    task: Answering,
    hidden: frozenset[str],
) -> Need:
    incident = by_key.get((group.task, group.fingerprint))
    known = (
        group.fingerprint if group.fingerprint in ("empty", "quarantine", "kept_back") else "failed"
    )
    return Need(
        kind=known,
        incident=incident.id if incident is not None else None,
        task=group.task,
        fingerprint=group.fingerprint,
        open=group.number - group.retrying,
        retrying=group.retrying,
        failing_since=min(
            (at for at in (group.first, incident and incident.opened_at) if at), default=None
        ),
        last_failed=group.last,
        first_seen=seen.get((group.task, group.fingerprint)),
        owner=task.owner,
        runbook=task.runbook,
        error="" if group.task in hidden or incident is None else incident.text,
        newest_run=incident.newest_run if incident is not None else None,
    )


async def _first_seen(
    connection: AsyncConnection, groups: Sequence[open_failures.Group]
) -> dict[tuple[str, str], datetime]:
    """When each of these errors was seen for the first time."""
    if not groups:
        return {}
    names = sorted({group.task for group in groups})
    theirs = json_rows.is_among(fingerprints.c.task, names, connection.dialect.name)
    rows = await connection.execute(select(fingerprints).where(theirs))
    return {(row.task, row.fingerprint): row.first_seen_at for row in rows}


def _task_of(incident: Row[Any]) -> str | None:
    task: str | None = incident.task or (incident.details or {}).get("task")
    return task


def others(found: InNeed, answering: Mapping[str, Answering]) -> list[Need]:
    """What needs a person without a failed run: silent tasks, missed deadlines, unusable files,
    unserved pools.
    """
    return [_other(row, answering.get(row.task, NOBODY)) for row in found.others]


def _other(row: Row[Any], task: Answering) -> Need:
    return Need(
        kind=row.kind,
        incident=row.id,
        task=_task_of(row),
        subject=row.subject or None,
        open=row._mapping["count"],
        failing_since=row.opened_at,
        last_failed=row.last_at,
        owner=task.owner,
        runbook=task.runbook,
        error=row.text,
        acknowledged_by=row.acknowledged_by,
    )


async def quarantined_items(context: Context) -> Counter[str] | None:
    """How many items wait in quarantine, by task; None if the application's database can't be
    read.
    """
    application = context.databases.application
    if is_missing_file(application):
        return Counter()
    try:
        if not await has_table(application):
            return Counter()
        return Counter(await quarantine.waiting_by_task(application, MOST_ITEMS))
    except (DBAPIError, OSError):
        return None


def of_quarantine(waiting: Counter[str], answering: Mapping[str, Answering]) -> list[Need]:
    """Items in quarantine that wait for a redrive, by task."""
    needs = []
    for name, number in sorted(waiting.items()):
        task = answering.get(name, NOBODY)
        needs.append(
            Need(
                kind="quarantine",
                incident=None,
                task=name,
                open=number,
                owner=task.owner,
                runbook=task.runbook,
                error=f"{number:,} item waits in quarantine"
                if number == 1
                else f"{number:,} items wait in quarantine",
            )
        )
    return needs


async def dealt_with(
    connection: AsyncConnection, since: datetime, until: datetime, hidden: frozenset[str]
) -> list[DealtWith]:
    """The incidents of runs that were closed in the window, the newest first.

    An incident that was made good counts as dealt with by somebody if a person or code asked for
    the run that did it.
    """
    by = select(_success.c.requested_by).where(
        _failure.c.id == incidents_table.c.newest_run, _success.c.id == _failure.c.made_good_by
    )
    query = (
        select(incidents_table, by.scalar_subquery().label("good_by"))
        .where(incidents_table.c.closed_at >= since, incidents_table.c.closed_at < until)
        .order_by(incidents_table.c.closed_at.desc(), incidents_table.c.id.desc())
        .limit(1_000)
    )
    return [
        DealtWith(
            incident=row.id,
            task=row.task or None,
            kind=row.kind,
            how=row.closed_why,
            by=row.acknowledged_by or row.good_by,
            at=row.closed_at,
            note=None if row.task in hidden else row.note,
            runs=row._mapping["count"],
            error="" if row.task in hidden else row.text,
        )
        for row in await connection.execute(query)
        if row.kind in OF_RUNS
    ]
