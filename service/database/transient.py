"""Which errors of a database are over by themselves: the same transaction may go through when it is tried again."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError

from service.errors import DatabaseBusy

SQLSTATES = {"40001", "40P01", "55P03"}  # serialization failure, deadlock, a lock that could not be had
CLASSES = {"08", "57", "53"}  # connections, the server's shutdown and start, its resources


def is_transient(error: BaseException) -> bool:
    """A serialization failure, a deadlock, a lock, a connection that was lost or can't be made."""
    if isinstance(error, DBAPIError):
        sqlstate = str(getattr(error.orig, "sqlstate", None) or "")
        return (
            error.connection_invalidated
            or sqlstate in SQLSTATES
            or sqlstate[:2] in CLASSES
            or (isinstance(error.orig, sqlite3.OperationalError) and "locked" in str(error.orig))
        )
    return isinstance(error, DatabaseBusy | ConnectionError)
