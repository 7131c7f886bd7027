"""Databases: `get_db()` for authors, `Database` for the service, our tables beside the authors'
data.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch_system.database.engine import Database as Database
    from batch_system.database.our_tables import include_object as include_object
    from batch_system.database.session import get_db as get_db

_HOMES = {"Database": "engine", "get_db": "session", "include_object": "our_tables"}
__all__ = ["Database", "get_db", "include_object"]


def __getattr__(name: str) -> Any:
    """Import a name on first use: the process that makes a backup needs the names of our tables,
    but no SQLAlchemy.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
