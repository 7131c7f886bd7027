"""`operations.incidents`: what needs a person; to acknowledge it, and to send nothing about a task
for a while.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.incidents import problem as one_error
from service.batch.ledger import chains, database_time, wakes
from service.batch.ledger import tasks as task_rows
from service.batch.ledger.incidents import acknowledging, incidents, outbox
from service.batch.ledger.incidents.outbox import Note
from service.batch.ledger.people import audit
from service.batch.ledger.states import OF_RUNS
from service.batch.ledger.states import IncidentKind as IncidentKind
from service.errors import InvalidParameters, UnknownIncident, UnknownTask
from service.escaping import echoed
from service.operations.asking.context import Context
from service.operations.asking.cursors import cursor_of, parse_cursor
from service.operations.asking.results import KeptBack, Result
from service.operations.incidents import open_failures
from service.operations.incidents.ending import tell_followers, tell_followers_again
from service.operations.incidents.notes import check_note
from service.operations.people.redacting import hidden_tasks

MOST_INCIDENTS = 200
LONGEST_QUIET = timedelta(days=7)
LONGEST_MUTE = timedelta(days=31)


class Incident(Result):
    """Something that needs a person, or needed one. `subject`: a node, a file or a place, where it
    is about one.

    `count`: its failures, slots or rows so far, also those that are over. `open`: of an open
    incident of runs, how many of them are neither made good nor acknowledged, which is the number
    that Night and the status say. `run`: the newest run that it is about. `told_at`: when a message
    about it was written last. `closed_why`: made_good, acknowledged, or over. `quiet_until`: until
    then the same error opens no other incident. `error`: open incidents of other tasks with the
    same one are one problem, if they began together.
    """

    id: str
    kind: IncidentKind
    task: str | None
    subject: str | None
    fingerprint: str | None
    text: str
    opened_at: datetime
    last_at: datetime
    count: int
    open: int | None = None
    run: str | None
    told_at: datetime | None
    closed_at: datetime | None
    closed_why: str | None
    acknowledged_at: datetime | None
    acknowledged_by: str | None
    note: str | None
    quiet_until: datetime | None
    error: str | None = None


class IncidentDetails(Incident):
    """An incident, and the runs that wait for a success of its failed runs (`keeps_back`)."""

    keeps_back: Sequence[KeptBack] = ()


class IncidentPage(Result):
    """A page of incidents, the newest first. `after`: the cursor of the next page; None at the
    end.
    """

    incidents: list[Incident]
    after: str | None


class Acknowledged(Result):
    """An acknowledgement. `runs`: how many failed runs it is about.

    `still_open`: how many runs have failed after the given instant. If there are any, the incident
    stays open.
    """

    incident: Incident
    runs: int
    still_open: int


class Muted(Result):
    """A task about which nothing is sent until an instant (UTC)."""

    task: str
    until: datetime
    by: str
    note: str | None


class SentTest(Result):
    """The channels to which a test message was written; the service sends it."""

    channels: list[str]


class Incidents:
    """Raises DatabaseError if the ledger can't be read."""

    def __init__(self, context: Context, channels: Sequence[str] = ()) -> None:
        """`channels`: the names of the channels that the settings have."""
        self._context = context
        self._channels = channels

    async def list(
        self,
        state: Literal["open", "closed", "all"] = "open",
        kind: IncidentKind | None = None,
        task: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> IncidentPage:
        """A page of at most `limit` incidents. Raises InvalidParameters for a cursor that no page
        has given.
        """
        limit = min(limit, MOST_INCIDENTS)
        before = parse_cursor(after) if after is not None else None
        is_open = None if state == "all" else state == "open"
        async with self._context.databases.reading() as connection:
            if connection is None:
                return IncidentPage(incidents=[], after=None)
            query = incidents.listing(limit + 1, before, is_open=is_open, kind=kind, task=task)
            rows = (await connection.execute(query)).all()
            hidden = await hidden_tasks(connection, self._context)
            numbers = await _open_runs(connection, rows)
        shown = [_shown(row, hidden, numbers) for row in rows[:limit]]
        key = cursor_of((shown[-1].opened_at, shown[-1].id)) if len(rows) > limit else None
        return IncidentPage(incidents=shown, after=key)

    async def show(self, incident: str) -> IncidentDetails:
        """An incident, by its id or the end of it. Raises UnknownIncident."""
        async with self._context.databases.reading() as connection:
            row = await _find(connection, incident)
            assert connection is not None
            hidden = await hidden_tasks(connection, self._context)
            error = (row.task, row.fingerprint)
            is_open = row.kind == IncidentKind.FAILED and row.closed_at is None
            kept = (await chains.kept_back_by_errors(connection, [error] if is_open else [])).get(
                error, ()
            )
            numbers = await _open_runs(connection, [row])
        keeps_back = [KeptBack(**vars(each)) for each in kept]
        return IncidentDetails(**dict(_shown(row, hidden, numbers)), keeps_back=keeps_back)

    async def acknowledge(
        self,
        incident: str,
        note: str,
        quiet_until: datetime | None = None,
        failed_until: datetime | None = None,
    ) -> Acknowledged:
        """Say that a person takes care of an open incident, and why. Its failed runs no longer
        count as open.

        An incident that is not about runs stays open until its cause is over. `quiet_until` (aware,
        7 days at most): until then, or the first success of the task, the same error opens no other
        incident. `failed_until` (aware): only the runs that had failed by then are meant, such as
        the `last_at` of the incident that the person has seen; with `quiet_until`, those that
        failed since are meant as well. Raises UnknownIncident, and InvalidParameters if the note is
        too short or too long, or the instant too late.
        """
        check_note(note)
        context = self._context
        async with context.databases.changing() as connection:
            row = await _find(connection, incident)
            now = await database_time.now_of(connection)
            if quiet_until is not None and not now < quiet_until <= now + LONGEST_QUIET:
                raise InvalidParameters("quiet_until: allowed is an instant within the next 7 days")
            bound = failed_until if quiet_until is None else None
            done = await acknowledging.acknowledge(
                connection, row.id, context.actor.name, note, quiet_until, now, bound
            )
            if done.is_new:
                after = {
                    "runs": done.runs,
                    "quiet_until": quiet_until.isoformat() if quiet_until else None,
                }
                await audit.record(
                    connection,
                    context.actor.by,
                    "incident.acknowledge",
                    now,
                    task=row.task or None,
                    target=row.id,
                    after=after,
                    note=note,
                )
            await tell_followers(connection, context, done.closed, now)
            shown = _shown(await _find(connection, row.id), await hidden_tasks(connection, context))
        return Acknowledged(incident=shown, runs=done.runs, still_open=done.still_open)

    async def with_same_error(self, incident: str) -> Sequence[Incident]:
        """The open incidents that are one problem with this one, and itself. Raises
        UnknownIncident.
        """
        async with self._context.databases.reading() as connection:
            row = await _find(connection, incident)
            assert connection is not None
            hidden = await hidden_tasks(connection, self._context)
            return [
                _shown(each, hidden) for each in await open_failures.one_problem(connection, row)
            ]

    async def reopen(self, incident: str) -> Incident:
        """Undo an acknowledgement: its failed runs count as open again. Raises UnknownIncident."""
        context = self._context
        async with context.databases.changing() as connection:
            row = await _find(connection, incident)
            now = await database_time.now_of(connection)
            if await acknowledging.undo(connection, row.id, now):
                by, task = context.actor.by, row.task or None
                await audit.record(connection, by, "incident.reopen", now, task=task, target=row.id)
            reopened = await _find(connection, row.id)
            if row.closed_at is not None and reopened.closed_at is None:
                await tell_followers_again(connection, context, reopened, now)
            return _shown(reopened, await hidden_tasks(connection, context))

    async def mute(self, task: str, until: datetime, note: str | None = None) -> Muted:
        """Send nothing about a task until an instant (aware, 31 days at most). Incidents are opened
        as ever.

        What is still open then is sent then. Raises UnknownTask and InvalidParameters.
        """
        context = self._context
        async with context.databases.changing() as connection:
            now = await database_time.now_of(connection)
            if not now < until <= now + LONGEST_MUTE:
                raise InvalidParameters(
                    "the end of a mute: allowed is an instant within the next 31 days"
                )
            if not await task_rows.mute(connection, task, until, context.actor.name, note):
                raise UnknownTask(f"the ledger knows no task {echoed(task)}")
            after = {"until": until.isoformat()}
            await audit.record(
                connection, context.actor.by, "task.mute", now, task=task, after=after, note=note
            )
            await wakes.catalog_changed(connection)
        return Muted(task=task, until=until, by=context.actor.name, note=note)

    async def unmute(self, task: str) -> bool:
        """Send messages about a task again. Returns whether it was muted. Raises UnknownTask."""
        context = self._context
        async with context.databases.changing() as connection:
            now = await database_time.now_of(connection)
            row = await task_rows.get(connection, task)
            if row is None:
                raise UnknownTask(f"the ledger knows no task {echoed(task)}")
            was_muted = row["muted_until"] is not None and row["muted_until"] > now
            await task_rows.mute(connection, task, None, None, None)
            if was_muted:
                await audit.record(connection, context.actor.by, "task.unmute", now, task=task)
                await wakes.catalog_changed(connection)
        return was_muted

    async def send_test(self, channels: Sequence[str] = ()) -> SentTest:
        """Write a test message to all channels of the settings, or to those of these names.

        Raises InvalidParameters if there is no such channel.
        """
        names = [
            name
            for name in self._channels
            if not channels or name in channels or name.rpartition("/")[0] in channels
        ]
        if not names:
            raise InvalidParameters(
                "there is no such channel; the settings have: "
                f"{', '.join(self._channels) or 'none'}"
            )
        context = self._context
        async with context.databases.changing() as connection:
            now = await database_time.now_of(connection)
            content: dict[str, Any] = {
                "kind": "test",
                "text": f"{context.actor.name} has sent this to see whether messages arrive.",
            }
            await outbox.write(connection, [Note(name, "test", content) for name in names], now)
            await audit.record(
                connection, context.actor.by, "alerts.test", now, target=", ".join(names)
            )
        return SentTest(channels=names)


async def _find(connection: AsyncConnection | None, incident: str) -> Any:
    row = await incidents.find(connection, incident) if connection is not None else None
    if row is None:
        raise UnknownIncident(f"there is no incident {echoed(incident)}")
    return row


async def _open_runs(connection: AsyncConnection, rows: Sequence[Any]) -> dict[str, int]:
    """How many runs of each of these incidents are open, by its id; without those that are closed
    or about no runs.
    """
    about = {
        row.id: (row.task, row.fingerprint)
        for row in rows
        if row.closed_at is None and row.kind in OF_RUNS
    }
    if not about:
        return {}
    by_key = await open_failures.incidents_by_key(connection)
    groups = await open_failures.groups(connection, by_key, {task for task, _ in about.values()})
    numbers = {(group.task, group.fingerprint): group.number for group in groups}
    return {incident: numbers.get(key, 0) for incident, key in about.items()}


def _shown(
    row: Any, hidden: frozenset[str], open_runs: Mapping[str, int] = MappingProxyType({})
) -> Incident:
    values = dict(row._mapping)
    empty = {name: values[name] or None for name in ("task", "subject", "fingerprint")}
    error = one_error.key_in(row.details)
    unseen = (
        {"text": "", "fingerprint": None, "note": None, "error": None} if row.task in hidden else {}
    )
    return Incident.of(
        {**values, **empty, "run": values["newest_run"], "error": error, **unseen},
        open=open_runs.get(row.id),
    )
