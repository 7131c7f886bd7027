"""Looks at the databases, their migrations and disks, the nodes, the files of tasks, the backups,
the channels and the dead man's switch.

One part that can't be looked at is a finding, too; the others are looked at all the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Row, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.alerts import pings
from batch_system.alerts.channels import Channels
from batch_system.batch.incidents.overdue import BACKUP_TASK, in_words
from batch_system.batch.incidents.watched import watched_tasks
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import nodes as node_rows
from batch_system.batch.ledger.incidents.outbox import listing
from batch_system.batch.ledger.incidents.tables import UNSENT_SQL, outbox
from batch_system.concurrency.offload import offload
from batch_system.database.engine import Database
from batch_system.errors import BatchError
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import is_missing_file
from batch_system.operations.doctor.results import Check, Diagnosis
from batch_system.operations.night.alarms import NAMES, sqlite_folders
from batch_system.operations.night.night import newest_backup
from batch_system.operations.system import migrations, nodes
from batch_system.operations.system.nodes import troubles_of
from batch_system.words import utc

SLOW_SECONDS = 0.5
"""A database that takes longer to answer is slow."""
LITTLE_SPACE = 1_000_000_000
"""A disk with fewer free bytes will soon be full."""
LATE_MESSAGE = timedelta(minutes=10)
LATELY = timedelta(days=1)
LARGE_LAG = 1.0
LONG_AGO = datetime.min.replace(tzinfo=UTC)
MOST_NAMED = 5

Look = Callable[[Context], Awaitable[list[Check]]]


async def diagnose(context: Context) -> Diagnosis:
    """Look at each part."""
    checks: list[Check] = []
    for part, look in _PARTS.items():
        try:
            checks += await look(context)
        except BatchError as error:
            checks.append(
                Check(part=part, health="bad", text=f"it can't be looked at: {error.message}")
            )
    return Diagnosis(ok=not any(check.health == "bad" for check in checks), checks=checks)


async def _databases(context: Context) -> list[Check]:
    databases = context.databases
    return [
        await _answers("ledger", databases.ledger),
        await _answers("application", databases.application),
    ]


async def _answers(part: str, database: Database) -> Check:
    if is_missing_file(database):
        do = "`batch migrate` makes it, and so does the start of a service"
        return Check(part=part, health="bad", text="there is no database yet", do=do)
    began = clock.monotonic()
    try:
        await database.check()
    except BatchError as error:
        do = "see that the database runs, and that its URL in the settings is right"
        return Check(part=part, health="bad", text=error.message, do=do)
    took = clock.monotonic() - began
    said = f"{database.kind} answers after {took * 1_000:,.0f} ms"
    if took > SLOW_SECONDS:
        do = "see what the machine, its disk and the network do"
        return Check(part=part, health="warning", text=said, do=do)
    return Check(part=part, health="good", text=said)


async def _migrations(context: Context) -> list[Check]:
    due = [each for each in await migrations.list_migrations(context) if each.is_due]
    if not due:
        return [Check(part="migrations", health="good", text="all tables are the newest")]
    return [
        Check(
            part="migrations",
            health="warning",
            text=f"{each.version_table} has {each.current or 'nothing'}; {each.newest} is due",
            do="`batch migrate`, or the start of a service, carries it out",
        )
        for each in due
    ]


async def _disks(context: Context) -> list[Check]:
    return await offload(_look_at_disks, context)


def _look_at_disks(context: Context) -> list[Check]:
    """The free space of each disk that the service writes to, as far as it is on this machine."""
    folders = {"backups": Path(context.settings.BACKUP_DIR).resolve()}
    folders |= {NAMES[part]: at for part, at in sqlite_folders(context.databases).items()}
    by_disk: dict[int, tuple[int, list[str]]] = {}
    checks = []
    for whose, folder in folders.items():
        try:
            existing = next(each for each in (folder, *folder.parents) if each.exists())
            free = shutil.disk_usage(existing).free
            by_disk.setdefault(existing.stat().st_dev, (free, []))[1].append(f"the {whose}")
        except OSError as error:
            said = f"the folder of the {whose} can't be used: {error.strerror}"
            checks.append(Check(part="disk", health="bad", text=said, do="change its setting"))
    for free, theirs in by_disk.values():
        said = f"{free / 1e9:,.1f} GB are free for {' and '.join(theirs)}"
        is_little = free < LITTLE_SPACE
        do = "make room on this disk" if is_little else None
        checks.append(Check(part="disk", health="bad" if is_little else "good", text=said, do=do))
    return checks


async def _nodes(context: Context) -> list[Check]:
    living = await nodes.living(context, with_workers=True)
    services = [node for node in living if node.fires]
    if not services:
        do = "start one: `batch serve`; without it no task fires"
        return [Check(part="services", health="bad", text="no service runs", do=do)]
    said = f"{len(services):,} service{'' if len(services) == 1 else 's'} and "
    workers = len(living) - len(services)
    said += f"{workers:,} worker{'' if workers == 1 else 's'} live"
    checks = [Check(part="services", health="good", text=said)]
    checks += [
        Check(
            part="readiness",
            health="bad",
            text=f"{named}: {reasons}",
            do="`/readyz` of the process and its log say more",
        )
        for named, reasons in troubles_of(living)
    ]
    checks += [
        Check(
            part="event loop",
            health="warning",
            text=f"process {node.pid} on {node.host} is {node.loop_lag:.1f} s late",
            do="find what blocks its event loop: sync code in `async def run`, or too many runs",
        )
        for node in living
        if (node.loop_lag or 0.0) > LARGE_LAG
    ]
    versions = {node.version for node in living}
    if len(versions) > 1:
        text = f"the processes have several versions: {', '.join(sorted(versions))}"
        do = "that is right during a rolling upgrade, and at no other time"
        checks.append(Check(part="versions", health="warning", text=text, do=do))
    return checks


async def _files(context: Context) -> list[Check]:
    broken = await nodes.broken_files(context)
    if not broken:
        return [Check(part="task files", health="good", text="all can be used")]
    return [
        Check(
            part="task files",
            health="bad",
            text=f"{file.source} on {', '.join(file.hosts[:MOST_NAMED])}: {file.error}",
            do="`batch lint` says where the error is",
        )
        for file in broken
    ]


async def _backups(context: Context) -> list[Check]:
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        now = await database_time.now_of(connection)
        watched = await watched_tasks(connection, [BACKUP_TASK])
        backup = await newest_backup(connection, watched.get(BACKUP_TASK), context.settings, now)
    if backup.name is None:
        do = "`batch run backup` makes one; its schedule may be paused"
        return [Check(part="backups", health="bad", text="there is no verified backup", do=do)]
    age = in_words(timedelta(seconds=backup.age or 0))
    said = f"the newest verified one, {backup.name}, is {age} old"
    if (backup.age or 0) > backup.limit:
        do = "`batch runs --task backup` says why there is no newer one"
        return [Check(part="backups", health="bad", text=said, do=do)]
    return [Check(part="backups", health="good", text=said)]


async def _channels(context: Context) -> list[Check]:
    channels = Channels.of(context.settings, checked=False)
    if not channels.by_name:
        do = "set BATCH_ALERT_URLS or BATCH_ALERT_WEBHOOK, then `batch alerts test`"
        text = "no channel is set here: nobody is told what happens"
        return [Check(part="channels", health="warning", text=text, do=do)]
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        return await _messages(connection, len(channels.by_name))


async def _messages(connection: AsyncConnection, number: int) -> list[Check]:
    now = await database_time.now_of(connection)
    is_late = (outbox.c.due_at <= now - LATE_MESSAGE) | (
        (outbox.c.attempts > 0) & (outbox.c.created_at <= now - LATE_MESSAGE)
    )
    waits = select(func.count(), func.min(outbox.c.created_at)).where(text(UNSENT_SQL), is_late)
    late = (await connection.execute(waits)).one()
    lately = outbox.c.created_at > now - LATELY
    lost = select(func.count()).where(lately, outbox.c.given_up_at.is_not(None))
    given_up = (await connection.execute(lost)).scalar_one()
    sent = (await connection.execute(listing(1, state="sent"))).first()
    last = sent.sent_at if sent is not None else None
    checks = []
    if late[0]:
        said = (
            f"{late[0]:,} messages wait for more than ten minutes, the oldest since {utc(late[1])}"
        )
        do = "`batch alerts list --state waiting` says why"
        checks.append(Check(part="channels", health="bad", text=said, do=do))
    if given_up:
        said = f"{given_up:,} messages were given up within a day"
        do = "`batch alerts list --state given_up` says why"
        checks.append(Check(part="channels", health="bad", text=said, do=do))
    if not checks:
        checks.append(_tried(number, last))
    return checks


def _tried(number: int, last: datetime | None) -> Check:
    """Whether the channels have ever taken a message."""
    if last is None:
        said, do = f"{number:,} set; nothing was sent yet", "`batch alerts test` tries them out"
        return Check(part="channels", health="warning", text=said, do=do)
    said = f"{number:,} set; the last message was sent {utc(last)}"
    return Check(part="channels", health="good", text=said)


async def _ping(context: Context) -> list[Check]:
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        now = await database_time.now_of(connection)
        rows = await node_rows.pings(connection)
    called = [_Called.of(row) for row in rows]
    last = max(called, key=lambda each: each.good_at, default=_NO_CALL)
    living = [each for each in called if not each.has_stopped]
    failing = max(living, key=lambda each: each.failed_at, default=_NO_CALL)
    error = f"to {failing.node} the dead man's switch {failing.error}"
    age = in_words(now - last.good_at)
    if last.good_at > now - pings.LATE:
        text = f"the last ping was {age} ago, by {last.node}"
        if failing.failed_at <= now - pings.LATE:
            return [Check(part="ping", health="good", text=text)]
        return [Check(part="ping", health="warning", text=f"{text}; {error}", do=_MEND_PING)]
    is_set = context.settings.BATCH_PING_URL is not None
    if living or (is_set and called):
        text = f"no ping has succeeded {'yet' if last.good_at == LONG_AGO else f'for {age}'}"
        text += f": {error}" if failing.failed_at > LONG_AGO else ""
        return [Check(part="ping", health="bad", text=text, do=_MEND_PING)]
    if is_set:
        text = "no service has called the dead man's switch yet"
        do = "a service with BATCH_PING_URL calls it once a minute, while it fires its tasks"
        return [Check(part="ping", health="warning", text=text, do=do)]
    text = "no dead man's switch is called: nobody is told when the whole service is gone"
    do = "set BATCH_PING_URL to the address of a monitor that waits for calls"
    return [Check(part="ping", health="warning", text=text, do=do)]


_MEND_PING = (
    "see that the services run, that BATCH_PING_URL is right, and that their machines reach it"
)


@dataclass(frozen=True)
class _Called:
    """What the calls of the dead man's switch by a process came to. `good_at`: when one succeeded
    last. `failed_at`, `error`: of the last one, if it has failed.
    """

    node: str
    has_stopped: bool
    good_at: datetime
    failed_at: datetime
    error: str

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """`row`: see nodes.pings."""
        ping = row.ping if isinstance(row.ping, dict) else {}
        return cls(
            node=f"process {row.pid} on {row.host}",
            has_stopped=row.stopped_at is not None,
            good_at=_instant(ping.get("good_at")),
            failed_at=_instant(ping.get("failed_at")),
            error=str(ping.get("error")),
        )


_NO_CALL = _Called("", False, LONG_AGO, LONG_AGO, "")


def _instant(value: object) -> datetime:
    """The instant of a value of JSON; LONG_AGO if it is none."""
    try:
        at = datetime.fromisoformat(str(value))
    except ValueError:
        return LONG_AGO
    return at if at.tzinfo is not None else LONG_AGO


_PARTS: dict[str, Look] = {
    "databases": _databases,
    "migrations": _migrations,
    "disk": _disks,
    "services": _nodes,
    "task files": _files,
    "backups": _backups,
    "channels": _channels,
    "ping": _ping,
}
