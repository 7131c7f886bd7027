"""Compares two runs of a task: the last good one with one that has failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.incidents.durations import Durations, UsualDurations
from batch_system.batch.ledger import calendars, schedules
from batch_system.batch.ledger.people import audit
from batch_system.concurrency.offload import offload
from batch_system.errors import BatchError
from batch_system.escaping import cut
from batch_system.operations.why import changes
from batch_system.operations.why.compared import Compared, compared, mapping_of
from batch_system.operations.why.log_kinds import new_lines
from batch_system.operations.why.results import Comparison, Part, RunDifference
from batch_system.redaction import MASK, Redaction

LONGEST = 200
"""A value is shown up to this many characters."""
ANOTHER = f"{MASK} (another value)"
MUCH = 1.5
"""A run took as long as the other one if neither took this many times as long."""
Differences = list[RunDifference] | None
"""What differs in one respect; None: that is not known of both."""


async def compare(
    connection: AsyncConnection, good: str, bad: str, redaction: Redaction, now: datetime
) -> Comparison | None:
    """What differs between two runs of one task; None if one of them was deleted just now."""
    one = await compared(connection, good)
    other = await compared(connection, bad, is_bad=True)
    if one is None or other is None:
        return None
    lines, kinds = await offload(new_lines, one.log, other.log)
    found = await _parts(connection, one, other, redaction, now)
    found["log"] = _of_logs(one, other, kinds)
    return Comparison(
        good=one.side,
        bad=other.side,
        differences=[each for its in found.values() for each in its or ()],
        same=[part for part, its in found.items() if its == []],
        new_lines=lines,
        new_kinds=kinds,
    )


async def compare_mended(
    connection: AsyncConnection, bad: str, good: str, redaction: Redaction, now: datetime
) -> Comparison | None:
    """What differs between a bad run and the later one that made it good, which may be its own
    retry; None if one of them was deleted just now. Their logs are not compared.
    """
    one = await compared(connection, bad, is_bad=True)
    other = await compared(connection, good)
    if one is None or other is None:
        return None
    found = await _parts(connection, one, other, redaction, now)
    differences = [each for its in found.values() for each in its or ()]
    return Comparison(
        good=other.side,
        bad=one.side,
        differences=[
            each.model_copy(update={"good": each.bad, "bad": each.good}) for each in differences
        ],
        same=[part for part, its in found.items() if its == []],
        new_lines=[],
        new_kinds=0,
    )


async def _parts(
    connection: AsyncConnection, one: Compared, other: Compared, redaction: Redaction, now: datetime
) -> dict[Part, Differences]:
    """What differs between a run and a later one, from the first as `good` to the second as
    `bad`.
    """
    usual = await UsualDurations(connection, now).of_task(one.row.task)
    return {
        "version": _of_versions(one, other),
        **await _declared(connection, one, other),
        "setting": await _of_settings(connection, one, other),
        "parameter": _of_parameters(one, other, redaction),
        **await _of_schedule(connection, one, other),
        "node": _of_hosts(one, other),
        "duration": _of_durations(one, other, usual),
    }


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
        before, after = mapping_of(event.before), mapping_of(event.after)
        if before.get("file") != after.get("file"):
            file = before.get("file"), file[1] if file is not None else after.get("file")
        old, new = mapping_of(before.get("policies")), mapping_of(after.get("policies"))
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
            old |= mapping_of(event.before)
            new = {**mapping_of(event.after), **new}
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
