"""One transaction of the watch: marks new rows as noticed, and opens, continues or closes incidents
for them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import failures
from batch_system.batch.execution.fingerprint import EMPTY, QUARANTINE
from batch_system.batch.incidents import made_good, outages
from batch_system.batch.incidents import problem as one_error
from batch_system.batch.incidents.overdue import in_words
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger import nodes as nodes_of_ledger
from batch_system.batch.ledger.attempts import KEPT_BACK
from batch_system.batch.ledger.incidents import incidents, marks, notices
from batch_system.batch.ledger.incidents.incidents import MORE, Opening
from batch_system.batch.ledger.incidents.tables import OPEN_SQL, fingerprints
from batch_system.batch.ledger.incidents.tables import incidents as incidents_table
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.states import Closed, IncidentKind, RunState
from batch_system.batch.ledger.tables import HELD_SQL, LEFT_SQL, nodes, runs
from batch_system.batch.ledger.waits import NO_TASK
from batch_system.batch.nodes.clock_steps import SET_FORWARD
from batch_system.batch.nodes.harm import LOST
from batch_system.batch.nodes.outage import Outage as OutageOfNode

CRASHES, CRASH_SPAN = 3, timedelta(minutes=10)
"""This many lost nodes on one host within this time are an incident of their own."""
CRASHES_OF = "crashes of "
BLOCK_OF = "block of "
BLOCKED_SECONDS = 40.0
"""An event loop that stands still for this long becomes an incident within a minute."""
MOST_NAMED = 5
"""How many tasks of a blocked node are named."""
MOST_OPEN = 50
"""The most open incidents of one task with an error each. All further errors of the task share one
incident.
"""

UNKNOWN = "unknown"
"""The fingerprint of a failed run without one, because an older version of the service wrote its
outcome.
"""


async def notice_runs(connection: AsyncConnection, now: datetime) -> tuple[int, set[str]]:
    """Notice the runs that have failed, or that ended otherwise but with something wrong.

    Returns how many it has seen, and their tasks.
    """
    marked = await notices.mark_runs(connection, now)
    if not marked:
        return 0, set()
    bad = [run for run in marked if _is_bad(run)]
    await _complete(connection, [run for run in bad if run.fingerprint is None])
    await _no_longer_bad(connection, [run for run in marked if not _is_bad(run)], now)
    groups = _groups([run for run in bad if run.acknowledged is None])
    quieted = {
        (task, fingerprint): incident.id
        for (task, fingerprint), incident in (
            await incidents.quiet(connection, groups.keys(), now)
        ).items()
        if not await made_good.successes_since(connection, task, incident.acknowledged_at, 1)
    }
    await _acknowledge(connection, {run.id: quieted[key] for key in quieted for run in groups[key]})
    for key in quieted:
        await _continue_quiet(connection, quieted[key], groups.pop(key))
    await _first_seen(connection, _groups(bad), now)
    openings = await _with_keys(
        connection, [_opening_of(key, members, now) for key, members in groups.items()]
    )
    await incidents.open_or_continue(connection, await _folded(connection, openings), now)
    return len(marked), {run.task for run in marked}


async def notice_ranges(
    connection: AsyncConnection, known_here: OutageOfNode, now: datetime
) -> int:
    """Notice slots that were missed although nobody chose that. Returns how many ranges it has
    seen.

    A range within an outage, or within a time in which living services did not fire, belongs to
    that incident. `known_here`: the outages of the ledger as this process has seen them. If one of
    them has no incident yet, it gets one now.
    """
    ranges = await notices.mark_ranges(connection)
    unchosen = [each for each in ranges if each["cause"] in (Cause.DOWN, Cause.OTHER)]
    if unchosen:
        await _notice_steps(
            connection, [each for each in unchosen if each["reason"].startswith(SET_FORWARD)], now
        )
        known = await outages.since(connection, min(each["first_slot"] for each in unchosen))
        if await _notice_outages(connection, unchosen, known, known_here, now):
            known = await outages.since(connection, min(each["first_slot"] for each in unchosen))
        openings: dict[str, Opening] = {}
        slots: dict[str, Counter[str]] = defaultdict(Counter)
        for each in unchosen:
            its = next(
                (outage for outage in known if outage.has(each["first_slot"], each["last_slot"])),
                None,
            )
            if its is not None:
                slots[its.incident][each["task"]] += each["unnoticed"]
            else:
                openings[each["task"]] = _missed(each, openings.get(each["task"]))
        for outage in known:
            if outage.incident in slots:
                await outages.add_slots(connection, outage, slots[outage.incident], now)
        await incidents.open_or_continue(connection, openings.values(), now)
    return len(ranges)


async def notice_nodes(connection: AsyncConnection, now: datetime, patience: timedelta) -> int:
    """Notice lost nodes whose runs were not resumed within `patience`, and files that can't be
    used.

    Returns how many nodes are settled. A node that was lost more recently is looked at again.
    """
    rows = await notices.unnoticed_nodes(connection)
    decided = [node for node in rows if node.lost_at is None or node.lost_at + patience <= now]
    if not decided:
        return 0
    lost = [node for node in decided if node.lost_at is not None]
    openings = [opening for node in lost if (opening := await _lost(connection, node)) is not None]
    openings += await crash_loops(connection, now) if lost else []
    await incidents.open_or_continue(connection, openings, now)
    await _notice_files(connection, now)
    await notices.mark_nodes(connection, incidents.ids_of(decided), now)
    return len(decided)


async def notice_backups(connection: AsyncConnection, now: datetime) -> int:
    """Notice backups that failed a check. Returns how many it has seen."""
    marked = await notices.mark_backups(connection, now)
    openings = {
        row["place"]: Opening(
            IncidentKind.BACKUP,
            f"the backup {row['name']} is not usable: {row['failed_check'] or 'a check failed'}",
            row["failed_at"],
            subject=row["place"][:500],
            details={"name": row["name"]},
        )
        for row in marked
    }
    await incidents.open_or_continue(connection, openings.values(), now)
    return len(marked)


# Runs


def _is_bad(run: Row[Any]) -> bool:
    is_kept_back = (run.state, run.fingerprint) == (RunState.SKIPPED, KEPT_BACK)
    harms = (run.state, run.fingerprint) == (RunState.RETRYING, LOST)
    return (
        run.state == RunState.FAILED
        or run.fingerprint in (EMPTY, QUARANTINE)
        or is_kept_back
        or harms
    )


def _groups(bad: Sequence[Row[Any]]) -> dict[tuple[str, str], list[Row[Any]]]:
    groups: dict[tuple[str, str], list[Row[Any]]] = defaultdict(list)
    for run in bad:
        groups[run.task, run.fingerprint or UNKNOWN].append(run)
    return dict(groups)


def _opening_of(key: tuple[str, str], members: Sequence[Row[Any]], now: datetime) -> Opening:
    """The opening of an incident of runs. A run without an end time is being retried, after it put
    items into quarantine.
    """
    task, fingerprint = key
    ordered = sorted(members, key=lambda run: (run.finished_at or now, run.id))
    oldest, newest = ordered[0], ordered[-1]
    return Opening(
        kind=_kind_of(newest),
        text=_TEXTS.get(fingerprint) or _with_advice(newest.reason or "it failed"),
        last_at=newest.finished_at or now,
        task=task,
        fingerprint=fingerprint,
        count=len(members),
        first_run=oldest.id,
        newest_run=newest.id,
    )


async def _with_keys(connection: AsyncConnection, openings: Sequence[Opening]) -> list[Opening]:
    """The openings with the keys of their errors. Incidents of several tasks with the same key are
    one problem (see problem.py).
    """
    failed = [
        each.newest_run
        for each in openings
        if each.kind == IncidentKind.FAILED and each.newest_run is not None
    ]
    keys = await one_error.keys(connection, failed)
    return [
        replace(each, details={one_error.KEY: keys[each.newest_run]})
        if each.newest_run in keys
        else each
        for each in openings
    ]


def _with_advice(reason: str) -> str:
    if not reason.startswith(NO_TASK):
        return reason
    return (
        f"{reason}, which it comes after; deploy that task or change `after`, and retry the "
        "skipped slots"
    )


_TEXTS = {QUARANTINE: "it has put items into quarantine"}


def _kind_of(run: Row[Any]) -> IncidentKind:
    if run.state == RunState.FAILED or run.fingerprint == LOST:
        return IncidentKind.FAILED
    return {EMPTY: IncidentKind.EMPTY, KEPT_BACK: IncidentKind.KEPT_BACK}.get(
        run.fingerprint, IncidentKind.QUARANTINE
    )


async def _complete(connection: AsyncConnection, unknown: Sequence[Row[Any]]) -> None:
    """Give failed runs without a fingerprint one, so that they count as open."""
    if unknown:
        await marks.mark(connection, incidents.ids_of(unknown), {"fingerprint": UNKNOWN})


async def _no_longer_bad(
    connection: AsyncConnection, ended: Sequence[Row[Any]], now: datetime
) -> None:
    """Nothing is wrong any more with runs that a person has retried with success, or has
    cancelled.
    """
    good = [run.id for run in ended if run.state == RunState.SUCCEEDED]
    cancelled = [run.id for run in ended if run.state in (RunState.CANCELLED, RunState.SKIPPED)]
    await marks.good_by_themselves(connection, good, now)
    await marks.mark(connection, cancelled, {"fingerprint": None})


async def _acknowledge(connection: AsyncConnection, by_run: dict[str, str]) -> None:
    """`by_run`: for each run, the acknowledged incident that it belongs to."""
    runs_by_incident: dict[str, list[str]] = defaultdict(list)
    for run, incident in by_run.items():
        runs_by_incident[incident].append(run)
    for incident, ids in runs_by_incident.items():
        await marks.mark(connection, ids, {"acknowledged": incident})


async def _continue_quiet(
    connection: AsyncConnection, incident: str, members: Sequence[Row[Any]]
) -> None:
    newest = max(members, key=lambda run: run.id)
    values = {
        "count": incidents_table.c.count + len(members),
        "last_at": max(
            (run.finished_at for run in members if run.finished_at),
            default=incidents_table.c.last_at,
        ),
        "newest_run": newest.id,
    }
    await connection.execute(
        update(incidents_table).where(incidents_table.c.id == incident).values(values)
    )


async def _first_seen(
    connection: AsyncConnection, groups: dict[tuple[str, str], list[Row[Any]]], now: datetime
) -> None:
    rows = [
        {
            "task": task,
            "fingerprint": fingerprint,
            "first_seen_at": min(run.finished_at or now for run in members),
            "error": (members[0].reason or "")[: failures.LONGEST_LINE],
        }
        for (task, fingerprint), members in sorted(groups.items())
    ]
    await json_rows.insert(connection, fingerprints, rows, "(task, fingerprint)")


async def _folded(connection: AsyncConnection, openings: list[Opening]) -> list[Opening]:
    """The openings. If a task already has too many open errors, its new ones are combined into one
    opening.
    """
    tasks = {opening.task for opening in openings}
    query = select(incidents_table.c.kind, incidents_table.c.task, incidents_table.c.fingerprint)
    theirs = json_rows.is_among(incidents_table.c.task, tasks, connection.dialect.name)
    opened = {tuple(row) for row in await connection.execute(query.where(text(OPEN_SQL), theirs))}
    number = Counter(task for _, task, _ in opened)
    kept: dict[tuple[str, str, str, str], Opening] = {}
    for opening in sorted(openings, key=lambda opening: opening.last_at):
        is_known = (opening.kind, opening.task, opening.fingerprint) in opened
        if not is_known and number[opening.task] >= MOST_OPEN:
            opening = _more(opening, kept.get((IncidentKind.FAILED, opening.task, "", MORE)))
        elif not is_known:
            number[opening.task] += 1
        kept[opening.key] = opening
    return list(kept.values())


def _more(opening: Opening, before: Opening | None) -> Opening:
    return Opening(
        IncidentKind.FAILED,
        f"more errors of this task, the newest: {opening.text}",
        opening.last_at,
        task=opening.task,
        fingerprint=MORE,
        count=opening.count + (before.count if before else 0),
        first_run=before.first_run if before else opening.first_run,
        newest_run=opening.newest_run,
    )


# Missed ranges


async def _notice_outages(
    connection: AsyncConnection,
    ranges: Sequence[Mapping[Any, Any]],
    known: Sequence[outages.Outage],
    known_here: OutageOfNode,
    now: datetime,
) -> bool:
    """Open an incident for each outage in which slots were missed and that has none, because the
    ledger could be read but not written. Returns whether there was one.
    """
    of_slots = [(each["first_slot"], each["last_slot"]) for each in ranges]
    found = [
        known_here.during(*slots)
        for slots in of_slots
        if not any(outage.has(*slots) for outage in known)
    ]
    new = {interval.since: interval for interval in found if interval is not None}
    for interval in new.values():
        await outages.record(connection, interval.since, interval.until, now, cause=interval.cause)
    return bool(new)


async def _notice_steps(
    connection: AsyncConnection, ranges: Sequence[Mapping[Any, Any]], now: datetime
) -> None:
    """Open one incident for each step of the clock over which slots were missed, however many tasks
    are affected.
    """
    for reason in sorted({each["reason"] for each in ranges}):
        theirs = [each for each in ranges if each["reason"] == reason]
        first, last = (
            min(each["first_slot"] for each in theirs),
            max(each["last_slot"] for each in theirs),
        )
        if not await outages.is_known(connection, first, last):
            await outages.record(connection, first, last, now, what=SET_FORWARD)


def _missed(each: Mapping[Any, Any], before: Opening | None) -> Opening:
    new = each["unnoticed"]
    slots = f"{new:,} slot" + ("" if new == 1 else "s")
    return Opening(
        IncidentKind.MISSED,
        f"{slots} up to {each['last_slot']:%Y-%m-%d %H:%M} UTC did not run: {each['reason']}",
        each["last_slot"],
        task=each["task"],
        count=new + (before.count if before else 0),
        details={
            "first": (before.details or {})["first"] if before else each["first_slot"].isoformat()
        },
    )


# Nodes


async def _lost(connection: AsyncConnection, node: Row[Any]) -> Opening | None:
    """The incident of a lost node; None if all of its runs were resumed or have ended."""
    theirs = select(runs.c.task).where(runs.c.node == node.id, text(LEFT_SQL))
    left = Counter((await connection.execute(theirs)).scalars())
    if not left:
        return None
    names = ", ".join(sorted(left)[:10])
    return Opening(
        IncidentKind.NODE,
        f"the node {node.host} (pid {node.pid}) was lost, and no other one goes on with its runs "
        f"of {names}",
        node.lost_at,
        subject=node.id,
        count=sum(left.values()),
    )


async def crash_loops(connection: AsyncConnection, now: datetime) -> list[Opening]:
    """The incident of each host on which CRASHES nodes were lost within CRASH_SPAN."""
    by_host: dict[str, list[Row[Any]]] = defaultdict(list)
    for node in await nodes_of_ledger.lost_since(connection, now - CRASH_SPAN):
        by_host[node.host].append(node)
    return [
        Opening(
            IncidentKind.NODE,
            f"{len(lost)} services on {host} have ended within {in_words(CRASH_SPAN)} without "
            f"saying so, the last one with pid {lost[0].pid}: look at its log, and whether its "
            "machine has enough memory",
            lost[0].lost_at,
            subject=f"{CRASHES_OF}{host}"[:500],
            count=len(lost),
        )
        for host, lost in sorted(by_host.items())
        if len(lost) >= CRASHES
    ]


async def blocked_nodes(connection: AsyncConnection, ids: Collection[str]) -> list[Opening]:
    """The incident of each of these nodes whose event loop stands still."""
    columns = (nodes.c.id, nodes.c.host, nodes.c.pid, nodes.c.loop_lag, nodes.c.seen_at)
    still = (nodes.c.id.in_(ids), nodes.c.stopped_at.is_(None), nodes.c.loop_lag >= BLOCKED_SECONDS)
    openings = []
    for node in await connection.execute(select(*columns).where(*still)) if ids else ():
        theirs = (
            select(runs.c.task)
            .where(runs.c.node == node.id, text(HELD_SQL))
            .distinct()
            .limit(MOST_NAMED + 1)
        )
        names = sorted((await connection.execute(theirs)).scalars())
        others = " and others" if names[MOST_NAMED:] else ""
        of = f": those of {', '.join(names[:MOST_NAMED])}{others}" if names else ""
        openings.append(
            Opening(
                IncidentKind.NODE,
                f"a run has blocked the event loop of {node.host} (pid {node.pid}) for "
                f"{in_words(timedelta(seconds=node.loop_lag))}, so it answers nobody, and its "
                f"runs do not go on{of}. Restart it, or wait until it ends by itself "
                "(MAX_LOOP_BLOCK): then its log names the run and the line",
                node.seen_at,
                subject=f"{BLOCK_OF}{node.id}",
                count=len(names),
            )
        )
    return openings


async def _notice_files(connection: AsyncConnection, now: datetime) -> None:
    """Open an incident for each file of tasks that a living node can't use, and close those of all
    other files.
    """
    living = (nodes.c.stopped_at.is_(None), nodes.c.broken.is_not(None))
    lists = (await connection.execute(select(nodes.c.broken).where(*living))).scalars()
    broken = {str(file["source"])[:500]: file for files in lists for file in files}
    opened = await incidents.are_open(connection, [IncidentKind.FILES])
    known = {row.subject: row for row in opened}
    mended = [row.id for source, row in known.items() if source not in broken]
    new = [
        Opening(
            IncidentKind.FILES,
            f"{source} can't be used: {file['error']}",
            now,
            subject=source,
            details={"task": file.get("task")},
            count=0 if source in known else 1,
        )
        for source, file in sorted(broken.items())
    ]
    await incidents.close(connection, mended, Closed.OVER, now)
    await incidents.open_or_continue(connection, new, now)
