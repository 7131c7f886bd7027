"""Operations: the one object by which a person or a program asks something of the system."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from service.batch.retention.retention import Keep
from service.config import Settings
from service.database.engine import Database
from service.operations.context import Context, Loaded, nothing
from service.operations.databases import Databases

if TYPE_CHECKING:
    from service.operations.backups.facet import Backups
    from service.operations.nodes import Nodes
    from service.operations.quarantine import Quarantine
    from service.operations.runs import Runs
    from service.operations.slots import Slots
    from service.operations.tasks import Tasks


class Operations:
    """What can be asked of the system, in facets: `tasks`, `runs`, `slots`, `quarantine`, `nodes`,
    `backups`.

    It makes no database engine, sets up no logging, reads no settings and imports no author's file: all that is handed
    in. So a serving process may call it for each request. It lives on the event loop of its databases.

    A facet is imported when it is first used: a command uses one, and all together take longer than most commands run.
    """

    def __init__(
        self,
        ledger: Database,
        application: Database,
        loaded: Callable[[], Loaded],
        settings: Settings,
        *,
        actor: str = "batch",
        wake: Callable[[], None] = nothing,
        node: str = "",
        are_ready: bool = False,
    ) -> None:
        """`are_ready`: both databases are migrated. The rest is explained in Context."""
        databases = Databases(ledger, application, settings.LEASE_SECONDS, are_ready=are_ready)
        keep = Keep(settings.KEEP_RUNS_DAYS, settings.KEEP_RUNS_PER_TASK)
        self._settings = settings
        self._context = Context(databases, loaded, actor, settings.LEASE_SECONDS, keep, wake, node)

    def by(self, actor: str) -> Operations:
        """The same, asked by `actor`, whose name will stand in the ledger beside what is changed."""
        return self._with(self._settings, replace(self._context, actor=actor))

    def under(self, settings: Settings) -> Operations:
        """The same, with other settings of backups: a service may have read them anew since it has started."""
        return self._with(settings, self._context)

    def _with(self, settings: Settings, context: Context) -> Operations:
        asked = object.__new__(type(self))
        asked._settings, asked._context = settings, context
        return asked

    @cached_property
    def tasks(self) -> Tasks:
        from service.operations.tasks import Tasks

        return Tasks(self._context)

    @cached_property
    def runs(self) -> Runs:
        from service.operations.runs import Runs

        return Runs(self._context)

    @cached_property
    def slots(self) -> Slots:
        from service.operations.slots import Slots

        return Slots(self._context)

    @cached_property
    def quarantine(self) -> Quarantine:
        from service.operations.quarantine import Quarantine

        return Quarantine(self._context)

    @cached_property
    def nodes(self) -> Nodes:
        from service.operations.nodes import Nodes

        return Nodes(self._context)

    @cached_property
    def backups(self) -> Backups:
        from service.operations.backups.access import BackupAccess
        from service.operations.backups.facet import Backups

        return Backups(BackupAccess(self._settings, self._context.databases), self._context.actor)


@asynccontextmanager
async def open_operations(
    settings: Settings, loaded: Callable[[], Loaded], actor: str = "batch"
) -> AsyncIterator[Operations]:
    """The operations of a process that is no service, such as a command: its databases keep no connection between uses.

    Nothing is connected to before it is needed. `loaded` is called where tasks are needed.
    """
    shows = settings.BATCH_SHOW_SQL_PARAMETERS
    ledger = Database(settings.ledger_url, setting="LEDGER_URL", pooled=False, shows_values=shows)
    application = Database(settings.DATABASE_URL, setting="DATABASE_URL", pooled=False, shows_values=shows)
    try:
        yield Operations(ledger, application, loaded, settings, actor=actor)
    finally:
        await application.dispose()
        await ledger.dispose()
