"""Operations: the object by which a person or a program reads and changes the system."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from batch_system.database.engine import Database
from batch_system.operations.asking.actor import Actor, refuse_lower_role
from batch_system.operations.asking.context import Context, Loaded, Performs, wake_nothing
from batch_system.operations.asking.databases import Databases
from batch_system.settings.settings import Settings

R = TypeVar("R")
SERVICE = Actor("batch", source="service")


class Operations:
    """Carries out verbs, each as an actor: `await operations(PauseTask(name="load"))`.

    It creates no database engine, sets up no logging, reads no settings and imports no tasks, so a
    serving process may use it for each request. It belongs to the event loop of its databases.

    Anything that is not a verb, such as what only the pages or this machine need, is a function in
    a room of operations, which gets the `context`.
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
        databases = Databases(ledger, application, settings, are_ready=are_ready)
        self.context = Context(databases, loaded, actor, settings, wake, wake_bulks, node, troubles)

    def by(self, actor: Actor) -> Operations:
        """The same operations for another actor, whose name the ledger records with each change."""
        return self._with(replace(self.context, actor=actor))

    def under(self, settings: Settings) -> Operations:
        """The same operations with other settings of backups, which may have changed since the
        service started.
        """
        return self._with(replace(self.context, settings=settings))

    def _with(self, context: Context) -> Operations:
        operations = object.__new__(type(self))
        operations.context = context
        return operations

    async def __call__(self, verb: Performs[R]) -> R:
        """Carry out a verb, as the actor of these operations. Raises Forbidden if its role does not
        allow that, and the errors of the verb's `perform`.
        """
        refuse_lower_role(self.context.actor, verb.role_needed)
        return await verb.perform(self.context)

    is_here = True
    """The ledger is used directly."""

    @property
    def actor(self) -> Actor:
        """Who asks for these operations."""
        return self.context.actor


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
        pooler=settings.BATCH_DATABASE_POOLER,
    )
    application = Database(
        settings.DATABASE_URL,
        setting="DATABASE_URL",
        pooled=False,
        shows_values=shows,
        pooler=settings.BATCH_DATABASE_POOLER,
    )
    async with AsyncExitStack() as stack:  # disposes of both, even if one is cancelled
        for database in (ledger, application):
            stack.push_async_callback(database.dispose)
        ledger.on_locked = on_locked
        yield Operations(ledger, application, loaded, settings, actor=actor)
