"""The operations on a database of a test, as a service makes them."""

from __future__ import annotations

from service.batch.tasks.registry import TaskRegistry
from service.config import Settings, get_settings
from service.database.engine import Database
from service.operations.asking.actor import Actor
from service.operations.asking.context import Loaded
from service.operations.asking.databases import Databases
from service.operations.backups.access import BackupAccess
from service.operations.operations import Operations


def operations_on(
    ledger: Database, application: Database | None = None, actor: str = "ann"
) -> Operations:
    """Both databases are migrated. `application` is None if a test does not use it."""
    return Operations(
        ledger,
        application or ledger,
        lambda: Loaded(TaskRegistry.tasks()),
        get_settings(),
        actor=Actor(actor),
        are_ready=True,
    )


def access(settings: Settings) -> BackupAccess:
    """For functions on backups: databases that keep no connection between uses, as commands have
    them.
    """
    ledger = Database(settings.ledger_url, setting="LEDGER_URL", pooled=False)
    application = Database(settings.DATABASE_URL, setting="DATABASE_URL", pooled=False)
    return BackupAccess(settings, Databases(ledger, application, settings.LEASE_SECONDS))
