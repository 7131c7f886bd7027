"""Maintenance: pauses or mutes all tasks, those of a pool, or those with a tag, now or later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.firing import pauses
from batch_system.batch.ledger import database_time, wakes
from batch_system.batch.ledger import maintenance as windows
from batch_system.batch.ledger.maintenance import MOST_OPEN, MaintenanceWindow
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.states import MaintenanceKind
from batch_system.batch.ledger.tables import new_id, tasks
from batch_system.errors import InvalidParameters, UnknownMaintenance
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.selection import Selection
from batch_system.operations.incidents.change import LONGEST_MUTE
from batch_system.operations.maintenance.results import Maintenance, MaintenanceList

PoolAndTags = tuple[str, Sequence[str]]
MOST_NAMED = 20
"""The most tags or pools that an error names."""


async def begin(
    context: Context,
    kind: MaintenanceKind,
    selection: Selection,
    begins_at: datetime | None = None,
    ends_at: datetime | None = None,
    note: str | None = None,
) -> Maintenance:
    """Pause or mute the tasks of a selection, at once or from an instant on (aware), until another
    one. Raises InvalidParameters.

    If the same selection is paused or muted already, and no beginning is given, only the end of
    that window is changed.
    """
    selection.check()
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        _check_times(kind, begins_at or now, ends_at, now)
        known = await _known(connection)
        _check_is_known(selection, known)
        opened = await windows.open_windows(connection, kind)
        same = (each for each in opened if (each.tag, each.pool) == (selection.tag, selection.pool))
        lasting = next((each for each in same if each.lasts_at(now)), None)
        if lasting is not None and begins_at is None:
            window = await _change_end(connection, context, lasting, ends_at, note, now)
            return _shown(window, known, now)
        if len(opened) >= MOST_OPEN:
            raise InvalidParameters(f"at most {MOST_OPEN:,} windows may last or be planned")
        window = MaintenanceWindow(
            id=new_id(),
            kind=kind,
            tag=selection.tag,
            pool=selection.pool,
            begins_at=max(now, begins_at or now),
            ends_at=ends_at,
            created_at=now,
            created_by=context.actor.name,
            note=note,
            begun_at=None,
        )
        await windows.add(connection, window)
        await _record(connection, context, f"maintenance.{kind}", window, note, now)
        if kind == MaintenanceKind.PAUSE and window.begins_at <= now:
            loaded = context.loaded().tasks if context.node else pauses.NO_TASKS
            await pauses.begin(connection, window, loaded, context.node)
        else:
            await wakes.catalog_changed(connection)
    return _shown(window, known, now, is_new=True)


async def end(context: Context, window: str, note: str | None = None) -> Maintenance:
    """End a window, or call off a planned one. Its tasks fire again, or messages about them are
    sent again. Raises UnknownMaintenance.
    """
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        found = await windows.get(connection, window)
        if found is None:
            raise UnknownMaintenance(f"there is no maintenance window {echoed(window)}")
        if await pauses.end_window(connection, found, now):
            await _record(connection, context, "maintenance.end", found, note, now)
            found = replace(found, ended_at=now)
        return _shown(found, await _known(connection), now)


async def list_windows(context: Context) -> MaintenanceList:
    """The windows that last or are planned."""
    async with context.databases.reading() as connection:
        if connection is None:
            return MaintenanceList(windows=[])
        now = await database_time.now_of(connection)
        return MaintenanceList(windows=await windows_at(connection, now))


async def windows_at(connection: AsyncConnection, now: datetime) -> list[Maintenance]:
    """The windows that last or are planned at `now`, by their beginning."""
    opened = await windows.open_windows(connection)
    known = await _known(connection) if opened else []
    shown = [_shown(window, known, now) for window in opened]
    current = [each for each in shown if each.state != "over"]
    return sorted(current, key=lambda each: (each.begins_at, each.id))


@dataclass(frozen=True)
class Selectable:
    """How many tasks there are, by tag, and by pool."""

    tasks: int
    tags: Mapping[str, int]
    pools: Mapping[str, int]


async def selectable(context: Context) -> Selectable:
    """What a selection can be."""
    async with context.databases.reading() as connection:
        known = await _known(connection) if connection is not None else []
    tags = Counter(tag for _, tags in known for tag in tags)
    return Selectable(len(known), tags, Counter(pool for pool, _ in known))


def _check_times(
    kind: MaintenanceKind, begins_at: datetime, ends_at: datetime | None, now: datetime
) -> None:
    if ends_at is not None and ends_at <= max(begins_at, now):
        raise InvalidParameters("the end: allowed is an instant after now and after the beginning")
    if kind == MaintenanceKind.MUTE and (ends_at is None or ends_at > begins_at + LONGEST_MUTE):
        raise InvalidParameters("the end of a mute: allowed is an instant within 31 days")


def _check_is_known(selection: Selection, known: Sequence[PoolAndTags]) -> None:
    """Raises InvalidParameters if no task has this tag, or is of this pool."""
    if selection.tag is not None:
        there = {tag for _, tags in known for tag in tags}
        asked, text = selection.tag, f"no task has the tag {selection.tag}"
    elif selection.pool is not None:
        there = {pool for pool, _ in known}
        asked, text = selection.pool, f"no task is of the pool {selection.pool}"
    else:
        return
    if asked not in there:
        named = sorted(there)[:MOST_NAMED] + (["…"] if len(there) > MOST_NAMED else [])
        raise InvalidParameters(f"{text}; there are: {', '.join(named) or 'none'}")


async def _change_end(
    connection: AsyncConnection,
    context: Context,
    window: MaintenanceWindow,
    ends_at: datetime | None,
    note: str | None,
    now: datetime,
) -> MaintenanceWindow:
    if ends_at is None or ends_at == window.ends_at:
        return window
    await pauses.change_end(connection, window, ends_at)
    changed = replace(window, ends_at=ends_at)
    await _record(connection, context, f"maintenance.{window.kind}", changed, note, now)
    return changed


async def _record(
    connection: AsyncConnection,
    context: Context,
    action: str,
    window: MaintenanceWindow,
    note: str | None,
    now: datetime,
) -> None:
    after: dict[str, Any] = {
        "kind": str(window.kind),
        "selection": window.selection,
        "from": window.begins_at.isoformat(),
    }
    if window.ends_at is not None:
        after["until"] = window.ends_at.isoformat()
    by, target = context.actor.by, window.selection
    await audit.record(connection, by, action, now, target=target, after=after, note=note)


async def _known(connection: AsyncConnection) -> list[PoolAndTags]:
    """The pool and the tags of each task that was not removed."""
    query = select(tasks.c.pool, tasks.c.tags).where(tasks.c.removed_at.is_(None))
    return [(row.pool, row.tags or ()) for row in await connection.execute(query)]


def _shown(
    window: MaintenanceWindow,
    known: Sequence[PoolAndTags],
    now: datetime,
    *,
    is_new: bool = False,
) -> Maintenance:
    is_over = window.ended_at is not None or (window.ends_at is not None and window.ends_at <= now)
    state: Literal["planned", "now", "over"] = "planned" if window.begins_at > now else "now"
    return Maintenance(
        id=window.id,
        kind=window.kind,
        tag=window.tag,
        pool=window.pool,
        begins_at=window.begins_at,
        ends_at=window.ends_at,
        by=window.created_by,
        note=window.note,
        state="over" if is_over else state,
        tasks=sum(window.is_about(pool, tags) for pool, tags in known),
        is_new=is_new,
    )
