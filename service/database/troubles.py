"""What is wrong with a database, in words: what it is, and what to do."""

from __future__ import annotations

import sqlite3

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from service import failures
from service.errors import BatchError

PRIMARY = 0xFF
"""SQLite's extended codes have the primary one in their last byte."""


def cause_of(error: BaseException, kind: str) -> str:
    """One line for a log, with what to do where that is known. `kind`: the database's."""
    if isinstance(error, TimeoutError):
        return "no answer in time" + ("; somebody may hold its write lock" if kind == "sqlite" else "")
    original = getattr(error, "orig", None) or error
    cause = (failures.message_of(original) or type(original).__name__).splitlines()[0]
    if not isinstance(error, DBAPIError | sqlite3.Error | BatchError | OSError):
        cause = f"{type(error).__name__}: {cause}"
    advice = advice_on(error)
    return f"{cause}: {advice}" if advice else cause


def advice_on(error: BaseException | None) -> str | None:
    """What to do about a full disk; None for any other error."""
    error = getattr(error, "orig", None) or error
    if getattr(error, "sqlstate", None) == "53100":
        return "the disk of its server is full; make room there"
    if not isinstance(error, sqlite3.Error):
        return None
    code = getattr(error, "sqlite_errorcode", 0) & PRIMARY
    if code == sqlite3.SQLITE_FULL:
        return "its disk is full; make room there"
    if code == sqlite3.SQLITE_IOERR:
        return "its disk is full, or it fails; make room there"
    return None


def on_error(context: ExceptionContext, where: str) -> None:
    """For the engine's `handle_error` event. `where`: the database and the setting that names it.

    An error that a full disk made says which disk, and what to do. Its class stays, for authors may look for it.
    """
    error, advice = context.sqlalchemy_exception, advice_on(context.original_exception)
    if isinstance(error, DBAPIError) and advice:
        error.args = (f"{error.args[0]}: {where}: {advice}", *error.args[1:])
    if context.statement is not None and _has_ended(context):
        context.is_disconnect = True  # so that the session refuses what follows, until it was rolled back


def _has_ended(context: ExceptionContext) -> bool:
    """SQLite ends a transaction by itself when its disk is full. Each statement after that would commit alone."""
    original, connection = context.original_exception, context.connection
    if not isinstance(original, sqlite3.Error) or connection is None or not connection.in_transaction():
        return False
    driver = connection.connection.driver_connection
    return driver is not None and not driver.in_transaction
