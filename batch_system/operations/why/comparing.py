"""Compares two runs of a task: the last good one with one that has failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.incidents.durations import Durations, UsualDurations
from batch_system.batch.ledger import attempts as attempt_rows
from batch_system.batch.ledger import calendars, run_logs, schedules
from batch_system.batch.ledger import nodes as node_rows
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, durations, runs
from batch_system.concurrency.offload import offload
from batch_system.errors import BatchError
from batch_system.escaping import cut
from batch_system.operations.why import changes
from batch_system.operations.why.log_kinds import FROM_EACH_END, new_lines
from batch_system.operations.why.results import Comparison, Part, RunDifference, Side
from batch_system.redaction import MASK, Redaction

SEARCHED = (50, 5_000)
"""A success is searched for in at most this many runs before the first failure; in the larger
number if it is not among the first.
"""
MOST_STARTS = 200
"""The start of a node is searched for in at most this many of the starts before the run."""
LONGEST = 200
"""A value is shown up to this many characters."""
ANOTHER = f"{MASK} (another value)"
MUCH = 1.5
"""A run took as long as the other one if neither took this many times as long."""
START = timedelta(minutes=1)
"""A node may execute a run before its start is in the audit."""

_COLUMNS = (
    "id",
    "task",
    "slot",
    "state",
    "params",
    "node",
    "count",
    "created_at",
    "attempt_started_at",
    "finished_at",
)


class Compared(NamedTuple):
    """A run, with what the ledger knows of the process that executed it last."""

    row: Row[Any]
    side: Side
    versions: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    log: Sequence[LogLine]

    @property
    def began_at(self) -> datetime:
        """When its last attempt began, or when it was made."""
        return self.side.started_at or self.side.created_at


async def last_good(connection: AsyncConnection, task: str, before: datetime) -> str | None:
    """The newest run of a task that was made before an instant and has succeeded; None if there is
    none among the runs that are searched.
    """
    for most in SEARCHED:
        if (found := await _newest_success(connection, task, before, most)) is not None:
            return found
    # So many others lie in between. The durations know when the task succeeded last.
    known = select(durations.c.last_success_at).where(durations.c.task == task)
    at: datetime | None = (await connection.execute(known)).scalar()
    if at is None or at >= before:
        return None
    return await _newest_success(connection, task, at, SEARCHED[-1])


async def _newest_success(
    connection: AsyncConnection, task: str, before: datetime, most: int
) -> str | None:
    newest = run_rows(
        ("id", "state", "fingerprint", "created_at"),
        runs.c.task == task,
        runs.c.created_at < before,
        NO_PART_SQL,
    )
    newest = newest.order_by(*NEWEST_FIRST).limit(most)
    searched = newest.subquery()
    query = (
        select(searched.c.id)
        .where(searched.c.state == RunState.SUCCEEDED, searched.c.fingerprint.is_(None))
        .order_by(searched.c.created_at.desc(), searched.c.id.desc())
        .limit(1)
    )
    found: str | None = (await connection.execute(query)).scalar()
    return found


async def compare(
    connection: AsyncConnection, good: str, bad: str, redaction: Redaction, now: datetime
) -> Comparison | None:
    """What differs between two runs of one task; None if one of them was deleted just now."""
    one = await _compared(connection, good)
    other = await _compared(connection, bad, is_bad=True)
    if one is None or other is None:
        return None
    usual = await UsualDurations(connection, now).of_task(one.row.task)
    lines, kinds = await offload(new_lines, one.log, other.log)
    found: dict[Part, list[RunDifference] | None] = {
        "version": _of_versions(one, other),
        **await _declared(connection, one, other),
        "setting": await _of_settings(connection, one, other),
        "parameter": _of_parameters(one, other, redaction),
        **await _of_schedule(connection, one, other),
        "node": _of_hosts(one, other),
        "duration": _of_durations(one, other, usual),
        "log": _of_logs(one, other, kinds),
    }
    differences = [each for part in found.values() for each in part or ()]
    return Comparison(
        good=one.side,
        bad=other.side,
        differences=differences,
        same=[part for part, its in found.items() if its == []],
        new_lines=lines,
        new_kinds=kinds,
    )


async def _compared(connection: AsyncConnection, run: str, is_bad: bool = False) -> Compared | None:
    """A run, by its last attempt. `is_bad`: by its last attempt that did not succeed, because a
    retry may have succeeded since.
    """
    row = (await connection.execute(run_rows(_COLUMNS, runs.c.id == run))).first()
    if row is None:
        return None
    ended = await attempt_rows.of_run(connection, run)
    bad = [each for each in ended if each["outcome"] != RunState.SUCCEEDED] if is_bad else []
    last = bad[-1] if bad else ended[-1] if ended else None
    node = last["node"] if last is not None else row.node
    began = last["started_at"] if last is not None else row.attempt_started_at
    over = last["ended_at"] if last is not None else row.finished_at
    known = await node_rows.get(connection, node) if node is not None else None
    start = await _start_of(connection, node, (began or row.created_at) + START) if node else None
    versions = _mapping((start or {}).get("versions"))
    if not versions and known is not None:
        versions = {"application": known["application"], "package": known["version"]}
    fences = [
        each
        for each in await run_logs.fences(connection, run)
        if not is_bad or last is None or each.fence == last["fence"]
    ]
    side = Side.of(
        row._mapping,
        run=run,
        started_at=began,
        finished_at=over,
        seconds=(over - began).total_seconds() if over is not None and began is not None else None,
        version=versions.get("application") or versions.get("package"),
        host=known["host"] if known is not None else None,
        lines=sum(each.lines for each in fences),
    )
    settings = (start or {}).get("settings")
    settings = settings if isinstance(settings, Mapping) else None
    return Compared(
        row, side, versions, settings, await run_logs.ends(connection, run, fences, FROM_EACH_END)
    )


async def _start_of(
    connection: AsyncConnection, node: str, until: datetime
) -> Mapping[str, Any] | None:
    """What the audit says about the start of a node: its versions and settings; None if it says
    nothing. Rows of nodes are deleted sooner.
    """
    starts = (
        select(events.c.id, events.c.target)
        .where(events.c.action == "service.start", events.c.at <= until)
        .order_by(events.c.at.desc(), events.c.id.desc())
        .limit(MOST_STARTS)
    )
    found = [row.id for row in await connection.execute(starts) if row.target == node]
    if not found:
        return None
    after = (
        await connection.execute(select(events.c.after).where(events.c.id == found[0]))
    ).scalar()
    return _mapping(after)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


Differences = list[RunDifference] | None
"""What differs in one respect; None: that is not known of both."""


def _of_versions(good: Compared, bad: Compared) -> Differences:
    if not good.versions or not bad.versions:
        return None
    names: Sequence[tuple[str, str | None]] = (("application", None), ("package", "batch-system"))
    return [
        RunDifference(part="version", name=shown, good=_text(old), bad=_text(new))
        for name, shown in names
        if (old := good.versions.get(name)) != (new := bad.versions.get(name))
    ]


async def _declared(
    connection: AsyncConnection, good: Compared, bad: Compared
) -> dict[Part, Differences]:
    """What differs in the task's file and in its policies, by the changes between the two runs."""
    query = audit.listing(
        changes.MOST, None, good.began_at, bad.began_at, good.row.task, "task.change"
    )
    files: list[RunDifference] = []
    policies: dict[str, tuple[Any, Any]] = {}
    file: tuple[Any, Any] | None = None
    for event in (await connection.execute(query)).all():  # the newest first
        before, after = _mapping(event.before), _mapping(event.after)
        if before.get("file") != after.get("file"):
            file = before.get("file"), file[1] if file is not None else after.get("file")
        old, new = _mapping(before.get("policies")), _mapping(after.get("policies"))
        for name in old.keys() | new.keys():
            latest = policies[name][1] if name in policies else new.get(name)
            policies[name] = old.get(name), latest
    if file is not None and file[0] != file[1]:
        files = [RunDifference(part="file", name=None, good=_text(file[0]), bad=_text(file[1]))]
    return {
        "file": files,
        "policy": [
            RunDifference(part="policy", name=name, good=_text(old), bad=_text(new))
            for name, (old, new) in sorted(policies.items())
            if old != new
        ],
    }


async def _of_settings(connection: AsyncConnection, good: Compared, bad: Compared) -> Differences:
    """The settings of the two processes; if the audit does not have both, the changes between."""
    has_both = good.settings is not None and bad.settings is not None
    if good.settings is not None and bad.settings is not None:
        old, new = dict(good.settings), dict(bad.settings)
    else:
        old, new = {}, {}
        query = audit.listing(
            changes.MOST, None, good.began_at, bad.began_at, action="settings.change"
        )
        for event in (await connection.execute(query)).all():  # the newest first
            old |= _mapping(event.before)
            new = {**_mapping(event.after), **new}
    return [
        RunDifference(
            part="setting",
            name=name,
            good=_text(old.get(name)),
            bad=_changed(old.get(name), new.get(name)),
        )
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) or (not has_both and new.get(name) == MASK)
    ]


def _changed(old: Any, new: Any) -> str | None:
    """The text of a new value. Of a secret it says only that there is another one."""
    is_secret = str(new).startswith(MASK) and str(old).startswith(MASK)
    is_within = old is not None and old == new and MASK in str(new)
    return ANOTHER if is_secret or is_within else _text(new)


def _of_parameters(good: Compared, bad: Compared, redaction: Redaction) -> list[RunDifference]:
    old, new = good.row.params or {}, bad.row.params or {}
    return [
        RunDifference(
            part="parameter",
            name=str(name),
            good=_value(name, old, redaction),
            bad=_changed(_value(name, old, redaction), _value(name, new, redaction)),
        )
        for name in sorted(old.keys() | new.keys(), key=str)
        if old.get(name) != new.get(name)
    ]


def _value(name: str, params: Mapping[str, Any], redaction: Redaction) -> str | None:
    return _text(redaction.masked({name: params[name]})[name]) if name in params else None


async def _of_schedule(
    connection: AsyncConnection, good: Compared, bad: Compared
) -> dict[Part, Differences]:
    """The schedules of the two runs, and how far the clock of their zone is ahead of UTC."""
    spans = await schedules.history(connection, good.row.task)
    old, new = (_span(spans, each.row) for each in (good, bad))
    if old is None or new is None:
        return {"schedule": None, "clock": None}
    schedule: list[RunDifference] = []
    clock: Differences = None
    crons = [" except on ".join(calendars.told(span["cron"]).values()) for span in (old, new)]
    texts = [
        cron if old["timezone"] == new["timezone"] else f"{cron} {span['timezone']}"
        for cron, span in zip(crons, (old, new), strict=True)
    ]
    if texts[0] != texts[1]:
        schedule.append(RunDifference(part="schedule", name=None, good=texts[0], bad=texts[1]))
    if old["timezone"] == new["timezone"]:
        name = str(new["timezone"])
        offsets = [_offset(name, each.row.slot or each.row.created_at) for each in (good, bad)]
        if None not in offsets:
            clock = [RunDifference(part="clock", name=name, good=offsets[0], bad=offsets[1])]
            clock = clock if offsets[0] != offsets[1] else []
    return {"schedule": schedule, "clock": clock}


def _span(spans: Sequence[Mapping[str, Any]], row: Row[Any]) -> Mapping[str, Any] | None:
    """The schedule that a task had when a run was made."""
    at = row.created_at
    return next((span for span in reversed(spans) if span["valid_from"] <= at), None)


def _offset(timezone: str, at: datetime) -> str | None:
    """Such as `UTC+02:00`; None if this version does not know the zone."""
    try:
        minutes = int(utc_offsets.offset(zone_of(timezone), at).total_seconds()) // 60
    except BatchError:
        return None
    return f"UTC{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"


def _of_hosts(good: Compared, bad: Compared) -> Differences:
    old, new = good.side.host, bad.side.host
    if old is None or new is None:
        return None
    if old == new:
        return []
    return [RunDifference(part="node", name=None, good=old, bad=new)]


def _of_durations(good: Compared, bad: Compared, usual: Durations) -> Differences:
    old, new = good.side.seconds, bad.side.seconds
    if old is None or new is None:
        return None
    if max(old, new) < 1 or max(old, new) < MUCH * min(old, new):
        return []
    p50, p95 = usual.p50, usual.p95
    known = f", usually {_took(p50)} to {_took(p95)}" if p50 is not None and p95 is not None else ""
    return [RunDifference(part="duration", name=None, good=f"{_took(old)}{known}", bad=_took(new))]


def _took(seconds: float) -> str:
    """Such as `54.3 s` or `2 min 7 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s" if minutes else f"{seconds:.1f} s"


def _of_logs(good: Compared, bad: Compared, kinds: int) -> Differences:
    if not good.side.lines or not bad.side.lines:
        return None
    if not kinds:
        return []
    old, new = (f"{n:,} line{'' if n == 1 else 's'}" for n in (good.side.lines, bad.side.lines))
    new += f", {kinds:,} new kind{'' if kinds == 1 else 's'}"
    return [RunDifference(part="log", name=None, good=old, bad=new)]


def _text(value: Any) -> str | None:
    """A value as text. A secret has only its mask."""
    if value is None:
        return None
    if isinstance(value, str):
        return MASK if value.startswith(f"{MASK} ") else cut(value, LONGEST)
    return cut(json.dumps(value, ensure_ascii=False, default=str), LONGEST)
