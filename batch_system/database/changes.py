"""Changes of a run's session that were neither committed nor rolled back. Finding them costs no
statement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction

from batch_system.logs import run_log

KEY = "batch_changes"
"""The key of a transaction's changes in the `info` of its session, and of its connection."""

_WRITES = re.compile(r"\s*(INSERT|UPDATE|DELETE|REPLACE|MERGE)\b", re.IGNORECASE)


@dataclass
class _Changes:
    """Whether the statements of a transaction have changed rows, and whether they had done so when
    each savepoint began.

    `count`: SQLite's number of all rows that this connection has changed.
    """

    count: int
    are_made: bool = False
    were_made: dict[SessionTransaction, bool] = field(default_factory=dict)


class TrackedSession(Session):
    """A session that knows whether its transaction has changed rows, if it belongs to a run."""


def track(engine: Engine) -> None:
    """Watch the statements on this engine, for the sessions of runs."""
    event.listen(engine, "after_cursor_execute", _after_statement)


def has_changes(session: Session) -> bool:
    """Whether the session has objects that are not flushed, or has changed rows in a transaction
    that is still open.
    """
    if session.new or session.deleted or any(map(session.is_modified, session.dirty)):
        return True
    changes: _Changes | None = session.info.get(KEY)
    return changes is not None and changes.are_made


def _after_statement(
    connection: Connection, cursor: Any, statement: str, _: Any, context: Any, __: bool
) -> None:
    changes: _Changes | None = connection.info.get(KEY)
    if changes is None or not (
        context.isinsert or context.isupdate or context.isdelete or _WRITES.match(statement)
    ):
        return
    if connection.dialect.name == "sqlite":  # SQLite has no rowcount with RETURNING
        before, changes.count = changes.count, _count(connection)
        changes.are_made |= changes.count != before
    else:
        changes.are_made |= cursor.rowcount != 0


def _count(connection: Connection) -> int:
    return getattr(connection.connection.driver_connection, "total_changes", 0)


@event.listens_for(TrackedSession, "after_begin")
def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.nested and KEY in session.info:
        session.info[KEY].were_made[transaction] = session.info[KEY].are_made
    elif run_log.get() is not None:
        session.info[KEY] = connection.info[KEY] = _Changes(_count(connection))


@event.listens_for(TrackedSession, "after_soft_rollback")
def _after_rollback(session: Session, transaction: SessionTransaction) -> None:
    """Rolling back a savepoint also undoes the changes since its beginning."""
    changes: _Changes | None = session.info.get(KEY)
    if changes is not None and transaction in changes.were_made:
        changes.are_made = changes.were_made[transaction]


@event.listens_for(TrackedSession, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(KEY, None)
