"""The details of what needs a person: the newest failure of each error, the last line of its log,
a later success, and what changed before. They are read for all errors together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import made_good
from batch_system.batch.ledger import run_logs
from batch_system.operations.night.results import ChangeBefore, LastLine, Need
from batch_system.operations.why import changes

TOGETHER = timedelta(minutes=10)
"""The processes of a deploy start within this time."""
LINES = 50
"""The last error is searched for in this many lines at the end of a log."""

Error = tuple[str, str]
"""A task, and the fingerprint of the error."""


async def completed(
    connection: AsyncConnection, needs: Sequence[Need], hidden: frozenset[str]
) -> list[Need]:
    """The needs of failed runs, completed with these details. There should be few of them."""
    failures = [(*_error(need), need.last_failed, need.failing_since) for need in needs]
    successes = await made_good.successes_around(connection, failures)
    newest = await made_good.newest_failures(connection, map(_error, filter(_lacks_run, needs)))
    found = [
        need.model_copy(
            update={
                "succeeded_since": successes[_error(need)][0],
                **_of_newest(need, newest, hidden),
            }
        )
        for need in needs
    ]
    shown = (each.newest_run for each in found if each.task not in hidden)
    lines = await _last_lines(connection, filter(None, shown))
    spans = {
        _error(need): (need.task, before, need.failing_since)
        for need in found
        if (before := successes[_error(need)][1]) is not None and need.failing_since is not None
    }
    changed = await _changes(connection, spans)
    return [
        need.model_copy(
            update={
                "last_line": lines.get(need.newest_run or "") if need.task not in hidden else None,
                "after": changed.get(_error(need)),
            }
        )
        for need in found
    ]


def _error(need: Need) -> Error:
    return need.task or "", need.fingerprint or ""


def _lacks_run(need: Need) -> bool:
    return need.newest_run is None or not need.error


def _of_newest(
    need: Need, newest: Mapping[Error, Row[Any]], hidden: frozenset[str]
) -> dict[str, Any]:
    """The newest run and its error, where the incident does not say them."""
    if not _lacks_run(need):
        return {}
    row = newest.get(_error(need))
    is_told = row is not None and need.task not in hidden
    return {
        "newest_run": row.id if row is not None else None,
        "error": (row.reason or "") if row is not None and is_told else "",
    }


async def _last_lines(connection: AsyncConnection, ids: Iterable[str]) -> dict[str, LastLine]:
    """The line of each log that tells most about the error, by run."""
    found: dict[str, LastLine] = {}
    for run, lines in (await run_logs.tails(connection, sorted({*ids}), LINES)).items():
        if (line := run_logs.telling_line(lines)) is not None:
            first = line.text.split("\n")[0][:1_000]
            found[run] = LastLine(at=line.at, level=line.level, text=first)
    return found


async def _changes(
    connection: AsyncConnection, spans: Mapping[Error, tuple[str | None, datetime, datetime]]
) -> dict[Error, ChangeBefore]:
    """The last change before each of these errors, if there was one. `spans`: its task, the last
    success of it, and the first failure.
    """
    found = await changes.of_each(connection, spans.values())
    return {error: _change(found[span], span[2]) for error, span in spans.items() if found[span]}


def _change(events: Sequence[Row[Any]], first: datetime) -> ChangeBefore:
    """A process with a new version or other settings has also started, but that is not what has
    changed.
    """
    causes = [
        each
        for each in events
        if each.action != "service.start" and each.at > events[0].at - TOGETHER
    ]
    event = causes[0] if causes else events[0]
    version = (event.after or {}).get("application") if event.action == "service.deploy" else None
    return ChangeBefore(
        kind=event.action, version=version, seconds=(first - event.at).total_seconds()
    )
