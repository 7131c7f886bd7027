"""The operations on a database that a test has, as a service makes them."""

from __future__ import annotations

from service.batch.tasks.registry import TaskRegistry
from service.config import get_settings
from service.database.engine import Database
from service.operations.context import Loaded
from service.operations.operations import Operations


def operations_on(ledger: Database, application: Database | None = None, actor: str = "ann") -> Operations:
    """Both databases are migrated; `application`: None where a test asks nothing of it."""
    return Operations(
        ledger,
        application or ledger,
        lambda: Loaded(TaskRegistry.tasks()),
        get_settings(),
        actor=actor,
        are_ready=True,
    )
