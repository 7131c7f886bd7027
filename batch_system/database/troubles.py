"""Errors of databases: what an SQLSTATE means, the cause in words, and errors without the values of
statements.

Errors end up in logs, in the ledger and at Sentry, so by default they do not show the parameters of
a statement.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from typing import Any

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from batch_system import failures
from batch_system.database import pooler
from batch_system.errors import BatchError, DatabaseBusy

SERIALIZATION_FAILURE = "40001"
DISK_FULL = "53100"
READ_ONLY = "25006"
NO_SUCH_TABLE = "42P01"
LOCKED = "55P03"
OF_POOLERS = {"08003", "08P01", "26000", "42P05"}
"""SQLSTATEs of a lost connection, of what the protocol does not allow, and of prepared statements
that are not there, or are there already.
"""
DEADLOCK = "40P01"
CONFLICTS = {SERIALIZATION_FAILURE, DEADLOCK, LOCKED}
"""SQLSTATEs of a serialization failure, a deadlock, and a lock that was not available."""
UNREACHABLE = {"08", "53", "57"}
"""Classes of SQLSTATE for a lost connection, for missing resources, and for a server that stops or
starts.
"""
DATA_EXCEPTION = "22"
REFUSED = {DATA_EXCEPTION, "23", "54"}
"""Classes of SQLSTATE for wrong data, for a violated constraint, and for a limit of the server."""

PRIMARY = 0xFF
"""SQLite's extended error codes have the primary code in their last byte."""
DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
DAMAGED = "its file is damaged"

SHORTEST = 4
"""A text parameter of at least this many characters is removed from messages. A shorter one may be
part of a word.
"""

MOST_VALUES = 10_000
"""How many parameters of a statement are looked for in the messages of its error."""

_CLASS = re.compile(r"^<class '[\w.]+'>: ")
"""What SQLAlchemy 2.0 puts before the text of a server's error."""
_DETAIL = re.compile(r"\nDETAIL: .*?(?=\nHINT: |\Z)", re.DOTALL)
_ARGUMENT = re.compile(
    r"(invalid input for query argument \$\d+(?: in element #\d+ of executemany\(\) sequence)?): "
    r".*",
    re.DOTALL,
)
_IN_QUOTES = re.compile(r'"[^"]*"')


def sqlstate_of(error: BaseException | None) -> str:
    """The SQLSTATE of a driver's error, or of the one that SQLAlchemy has wrapped; empty if it has
    none.
    """
    original = getattr(error, "orig", None) or error
    return str(getattr(original, "sqlstate", None) or "")


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed later: after a conflict, a lock, or a lost
    connection.
    """
    if isinstance(error, DBAPIError):
        sqlstate = sqlstate_of(error)
        return (
            error.connection_invalidated
            or sqlstate in CONFLICTS
            or sqlstate[:2] in UNREACHABLE
            or (isinstance(error.orig, sqlite3.OperationalError) and "locked" in str(error.orig))
        )
    return isinstance(error, DatabaseBusy | ConnectionError)


def is_unreachable(error: DBAPIError | OSError) -> bool:
    """Whether the connection failed or was cut off, so that the statement itself is not the
    cause.
    """
    return (
        isinstance(error, OSError)
        or error.connection_invalidated
        or sqlstate_of(error)[:2] in UNREACHABLE
    )


def is_busy(error: BaseException, kind: str) -> bool:
    """Whether the database is there, but locked or too slow, so that a run of this process may be
    the cause.

    `kind`: "sqlite" or "postgresql". A server that does not answer in time may be gone.
    """
    if isinstance(error, TimeoutError):
        return kind == "sqlite"
    original = getattr(error, "orig", None)
    is_locked = isinstance(original, sqlite3.OperationalError) and "locked" in str(original)
    return is_locked or sqlstate_of(error) in CONFLICTS


def is_refused(error: DBAPIError) -> bool:
    """Whether the database refuses the values of a statement, now and later. Some of asyncpg's
    errors have no SQLSTATE.
    """
    return isinstance(error, IntegrityError | DataError) or sqlstate_of(error)[:2] in REFUSED


def cause_of(error: BaseException, kind: str) -> str:
    """The cause in one line for a log, with advice if there is any. `kind`: "sqlite" or
    "postgresql".
    """
    if isinstance(error, TimeoutError):
        return "no answer in time" + (
            "; another process may hold its write lock" if kind == "sqlite" else ""
        )
    original = getattr(error, "orig", None) or error
    text = _CLASS.sub("", failures.message_of(original))
    cause = (text or type(original).__name__).splitlines()[0]
    if not isinstance(error, DBAPIError | sqlite3.Error | BatchError | OSError):
        cause = f"{type(error).__name__}: {cause}"
    advice = advice_on(error)
    return f"{cause}: {advice}" if advice else cause


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite has read something from the file that it never writes, so that no later try
    can succeed.
    """
    error = getattr(error, "orig", None) or error
    return (
        isinstance(error, sqlite3.Error)
        and getattr(error, "sqlite_errorcode", 0) & PRIMARY in DAMAGE
    )


def advice_on(error: BaseException | None) -> str | None:
    """The meaning of the error and advice, if its text lacks them: a full disk, a damaged file, a
    lock, a read-only server, a pooler. None for any other error.
    """
    error = getattr(error, "orig", None) or error
    if is_damage(error):
        return DAMAGED
    if sqlstate_of(error) == DISK_FULL:
        return "the disk of its server is full; make room there"
    if sqlstate_of(error) == READ_ONLY:
        return "its server takes no writes, as one from which another has taken over"
    if sqlstate_of(error) == LOCKED:
        return "another transaction holds a lock"
    if not isinstance(error, sqlite3.Error):
        return pooler.advice_on(str(error)) if sqlstate_of(error) in OF_POOLERS else None
    code = getattr(error, "sqlite_errorcode", 0) & PRIMARY
    if code == sqlite3.SQLITE_FULL:
        return "its disk is full; make room there"
    if code == sqlite3.SQLITE_IOERR:
        return "its disk is full, or it fails; make room there"
    return None


def on_error(context: ExceptionContext, where: str) -> None:
    """A listener for the engine's event `handle_error`. `where`: the database, and the setting that
    names it.

    The error of a full disk or a damaged file gets the database and the advice in its message, and
    keeps its class for authors' code.
    """
    error, advice = context.sqlalchemy_exception, advice_on(context.original_exception)
    if isinstance(error, DBAPIError) and advice:
        error.args = (f"{error.args[0]}: {where}: {advice}", *error.args[1:])
    if is_read_only(context.original_exception) and not _reads_only(context):
        context.is_disconnect = (
            True  # so that the pool opens all connections again, to the writing server
        )
    if context.statement is not None and _has_ended(context):
        context.is_disconnect = (
            True  # so that the session refuses further statements until it is rolled back
        )


def is_read_only(error: BaseException | None) -> bool:
    """Whether a server has refused a write because it only reads. Another server may have taken
    over.
    """
    return sqlstate_of(error) == READ_ONLY


def _reads_only(context: ExceptionContext) -> bool:
    """Whether the transaction was begun as read-only, so that a write in it is a mistake of its
    author.
    """
    connection = context.connection
    return connection is not None and bool(
        connection.get_execution_options().get("postgresql_readonly")
    )


def _has_ended(context: ExceptionContext) -> bool:
    """Whether SQLite has ended the transaction, as it does on a full disk. Each later statement
    would commit by itself.
    """
    original, connection = context.original_exception, context.connection
    if (
        not isinstance(original, sqlite3.Error)
        or connection is None
        or not connection.in_transaction()
    ):
        return False
    driver = connection.connection.driver_connection
    return driver is not None and not driver.in_transaction


def hide_values(context: ExceptionContext) -> None:
    """A listener for the engine's event `handle_error` that removes the statement's parameters from
    the messages.

    SQLAlchemy's `hide_parameters` is not enough: the DETAIL of a server's error has the values of a
    key or of a row, and errors about data quote the wrong value, both those of a server (class 22)
    and those of asyncpg.
    """
    values, errors = (
        list(_texts(context.parameters)),
        _chain(context.sqlalchemy_exception, context.original_exception),
    )
    quotes_data = any(map(_quotes_data, errors))
    for error in errors:
        if error.args and isinstance(error.args[0], str):
            error.args = (_without(error.args[0], values, quotes_data), *error.args[1:])
        if isinstance(getattr(error, "detail", None), str):  # asyncpg adds it to the text
            error.detail = None  # type: ignore[attr-defined]


def without_data(error: BaseException, text: str) -> str:
    """The text of an error, without the data that a server's error about data quotes."""
    return _IN_QUOTES.sub('"…"', text) if _quotes_data(error) else text


def _quotes_data(error: BaseException) -> bool:
    return str(getattr(error, "sqlstate", None) or "").startswith(DATA_EXCEPTION)


def _without(text: str, values: list[str], quotes_data: bool) -> str:
    text = _ARGUMENT.sub(r"\1, which does not fit its type", _DETAIL.sub("", text))
    for value in values:
        text = text.replace(value, "…")
    return _IN_QUOTES.sub('"…"', text) if quotes_data else text


def _texts(parameters: Any) -> Iterator[str]:
    """The texts among the parameters of one execution or of an executemany, the longest first."""
    waiting, seen, texts = [parameters], 0, set()
    while waiting and seen < MOST_VALUES:
        value = waiting.pop()
        seen += 1
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, str) and len(value) >= SHORTEST:
            texts.add(value)
    yield from sorted(texts, key=len, reverse=True)


def _chain(*errors: BaseException | None) -> list[BaseException]:
    """These errors, with all causes and contexts that they were raised from."""
    chain: list[BaseException] = []
    waiting = list(errors)
    while waiting:
        error = waiting.pop()
        if error is not None and not any(error is other for other in chain):
            chain.append(error)
            waiting += [error.__cause__, error.__context__]
    return chain
