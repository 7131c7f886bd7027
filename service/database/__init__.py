"""Databases: `get_db()` for authors, `Database` for the service."""

from service.database.engine import Database
from service.database.session import get_db

__all__ = ["Database", "get_db"]
