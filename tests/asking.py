"""The operations on a database of a test, as a service makes them."""

from __future__ import annotations

from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.config import Settings, get_settings
from batch_system.database.engine import Database
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.asking.databases import Databases
from batch_system.operations.backups.access import BackupAccess
from batch_system.operations.operations import Operations


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
    return BackupAccess(settings, Databases(ledger, application, settings))
