"""Databases: `get_db()` for authors, `Database` for the service, our tables beside the authors' data."""

from service.database.engine import Database
from service.database.our_tables import include_object
from service.database.session import get_db

__all__ = ["Database", "get_db", "include_object"]
