"""Operations: the object by which a person or a program reads and changes the system."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING

from service.batch.ledger.people import previews
from service.batch.retention.retention import Keep
from service.database.engine import Database
from service.operations.asking.actor import Actor
from service.operations.asking.context import Context, Loaded, wake_nothing
from service.operations.asking.databases import Databases
from service.redaction import Redaction
from service.settings.settings import Settings

if TYPE_CHECKING:
    from service.metrics.process import ProcessMetrics
    from service.operations.backups.facet import Backups
    from service.operations.backups.named import NamedBackups
    from service.operations.bulks.facet import Bulks
    from service.operations.incidents.facet import Incidents
    from service.operations.night.page import NightPage
    from service.operations.night.results import Night
    from service.operations.night.status import Status
    from service.operations.night.unaccounted import UnaccountedSlots
    from service.operations.people.access import Access
    from service.operations.people.changes import Changes
    from service.operations.runs.facet import Runs
    from service.operations.runs.quarantine import Quarantine
    from service.operations.slots.facet import Slots
    from service.operations.system.gauges import GaugeReader
    from service.operations.system.live import Look
    from service.operations.system.migrations import Migrations
    from service.operations.system.nodes import Nodes
    from service.operations.system.pools import Pools
    from service.operations.system.settings import UsedSettings
    from service.operations.tasks.facet import Tasks


SERVICE = Actor("batch", source="service")


class Operations:
    """All operations of the system, in the facets `tasks`, `runs`, `bulks`, `slots`, `quarantine`,
    `nodes`, `pools`,
    `backups`, `named_backups`, `incidents`, `changes`, `access` and `migrations`.

    It creates no database engine, sets up no logging, reads no settings and imports no tasks, so a
    serving process may use it for each request. It belongs to the event loop of its databases.

    A facet is imported on first use, because a command needs only one, and importing all takes
    longer than most commands.
    """

    def __init__(
        self,
        ledger: Database,
        application: Database,
        loaded: Callable[[], Loaded],
        settings: Settings,
        *,
        actor: Actor = SERVICE,
        wake: Callable[[], None] = wake_nothing,
        wake_bulks: Callable[[], None] = wake_nothing,
        node: str = "",
        troubles: Callable[[], Mapping[str, str]] = dict,
        are_ready: bool = False,
    ) -> None:
        """`are_ready`: both databases are migrated already. Context explains the other
        arguments.
        """
        databases = Databases(ledger, application, settings.LEASE_SECONDS, are_ready=are_ready)
        keep = Keep(
            settings.KEEP_RUNS_DAYS, settings.KEEP_RUNS_PER_TASK, settings.BATCH_KEEP_EVENTS_DAYS
        )
        self._settings = settings
        redaction = Redaction.of(settings.BATCH_SECRET_WORDS)
        lease = settings.LEASE_SECONDS
        followers = partial(_followers, settings)
        self._context = Context(
            databases,
            loaded,
            actor,
            lease,
            keep,
            wake,
            wake_bulks,
            node,
            troubles,
            redaction,
            followers,
        )

    def by(self, actor: Actor) -> Operations:
        """The same operations for another actor, whose name the ledger records with each change."""
        return self._with(self._settings, replace(self._context, actor=actor))

    def under(self, settings: Settings) -> Operations:
        """The same operations with other settings of backups, which may have changed since the
        service started.
        """
        return self._with(settings, self._context)

    def _with(self, settings: Settings, context: Context) -> Operations:
        operations = object.__new__(type(self))
        operations._settings, operations._context = settings, context
        return operations

    @property
    def actor(self) -> Actor:
        """Who asks for these operations."""
        return self._context.actor

    async def bulks_under_way(self) -> list[str]:
        """The ids of the bulks that have begun and not ended, the oldest first. A service asks it
        when it starts.
        """
        async with self._context.databases.reading() as connection:
            return await previews.under_way(connection) if connection is not None else []

    async def look(self, topics: Collection[str], run_ids: Collection[str]) -> Look:
        """What of runs, tasks and nodes is shown live. Raises DatabaseError if the ledger can't be
        read.
        """
        from service.operations.system.live import look

        return await look(self._context, topics, run_ids)

    async def status(self) -> Status:
        """Whether something is wrong, and what. Raises DatabaseError if the ledger can't be
        read.
        """
        from service.operations.night.status import status

        return await status(self._context, self._settings)

    async def night(
        self, since: datetime | None = None, until: datetime | None = None, zone: str | None = None
    ) -> Night:
        """What happened from `since` (aware; default: 18:00 of the day before, in the zone) to now,
        or `until`.

        `zone`: an IANA name; default: UTC. Raises NoLedger, InvalidParameters, InvalidSchedule for
        a zone that does not exist, and DatabaseError if the ledger can't be read.
        """
        from service.operations.night.night import night

        return await night(self._context, self._settings, since, until, zone)

    async def night_page(
        self, since: datetime | None, until: datetime | None, zone: str
    ) -> NightPage:
        """The same, with what the page of the night draws."""
        from service.operations.night.page import night_page

        return await night_page(self._context, self._settings, since, until, zone)

    async def unaccounted(
        self, since: datetime | None, until: datetime | None, zone: str
    ) -> UnaccountedSlots:
        """The slots of a window of Night that are unaccounted for: the newest 200, at no more cost
        than Night counts.

        The window is that of `night`. Raises NoLedger, InvalidParameters and InvalidSchedule as
        that does.
        """
        from service.operations.night import unaccounted

        return await unaccounted.slots(self._context, since, until, zone)

    def gauges(self, metrics: ProcessMetrics) -> GaugeReader:
        """A reader of what monitoring shows of the ledger. `metrics`: it is measured there how long
        a reading takes.
        """
        from service.operations.system.gauges import GaugeReader

        return GaugeReader(self._context, metrics, self._settings.pools)

    async def settings(self) -> UsedSettings:
        """The settings as they are used, without secrets."""
        from service.operations.system.settings import used

        return used(self._settings)

    @cached_property
    def tasks(self) -> Tasks:
        from service.operations.tasks.facet import Tasks

        return Tasks(self._context, list(self._settings.pools))

    @cached_property
    def runs(self) -> Runs:
        from service.operations.runs.facet import Runs

        return Runs(self._context)

    @cached_property
    def bulks(self) -> Bulks:
        from service.operations.bulks.facet import Bulks

        return Bulks(self._context)

    @cached_property
    def incidents(self) -> Incidents:
        from service.alerts.channels import Channels
        from service.operations.incidents.facet import Incidents

        return Incidents(self._context, list(Channels.of(self._settings, checked=False).by_name))

    @cached_property
    def changes(self) -> Changes:
        from service.operations.people.changes import Changes

        return Changes(self._context)

    @cached_property
    def access(self) -> Access:
        from service.operations.people.access import Access

        return Access(self._context)

    @cached_property
    def migrations(self) -> Migrations:
        from service.operations.system.migrations import Migrations

        return Migrations(self._context)

    @cached_property
    def slots(self) -> Slots:
        from service.operations.slots.facet import Slots

        return Slots(self._context)

    @cached_property
    def quarantine(self) -> Quarantine:
        from service.operations.runs.quarantine import Quarantine

        return Quarantine(self._context)

    @cached_property
    def nodes(self) -> Nodes:
        from service.operations.system.nodes import Nodes

        return Nodes(self._context)

    @cached_property
    def pools(self) -> Pools:
        from service.operations.system.pools import Pools

        return Pools(self._context, self._settings.pools)

    @cached_property
    def backups(self) -> Backups:
        from service.operations.backups.access import BackupAccess
        from service.operations.backups.facet import Backups

        return Backups(BackupAccess(self._settings, self._context.databases), self._context)

    @cached_property
    def named_backups(self) -> NamedBackups:
        from service.operations.backups.access import BackupAccess
        from service.operations.backups.named import NamedBackups

        return NamedBackups(self.backups, BackupAccess(self._settings, self._context.databases))


def _followers(settings: Settings) -> list[str]:
    from service.alerts.channels import Channels

    return Channels.of(settings, checked=False).followers()


@asynccontextmanager
async def open_operations(
    settings: Settings,
    loaded: Callable[[], Loaded],
    actor: Actor = SERVICE,
    on_locked: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Operations]:
    """The operations of a process that is not a service, such as a command.

    Its databases connect on first use, and keep no connection between uses. `loaded` is called when
    tasks are needed. `on_locked`: called, with the holder in words, when a change waits for the
    lock of a ledger of SQLite.
    """
    shows = settings.BATCH_SHOW_SQL_PARAMETERS
    ledger = Database(
        settings.ledger_url,
        setting=settings.ledger_setting,
        pooled=False,
        shows_values=shows,
        waits_briefly=True,
    )
    application = Database(
        settings.DATABASE_URL, setting="DATABASE_URL", pooled=False, shows_values=shows
    )
    async with AsyncExitStack() as stack:  # both are disposed of, also if that of one is cancelled
        for database in (ledger, application):
            stack.push_async_callback(database.dispose)
        ledger.on_locked = on_locked
        yield Operations(ledger, application, loaded, settings, actor=actor)
