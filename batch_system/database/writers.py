"""Tracks the writing session of an SQLite file, which can have one writer, and refuses a second one
of the same run.
"""

from __future__ import annotations

import asyncio
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from batch_system import clock
from batch_system.database.changes import TrackedSession
from batch_system.errors import SecondWriter
from batch_system.logs import get_logger

logger = get_logger(__name__)

LONG_SECONDS = 1.0
COMMIT_FIRST = "commit before you wait for anything else"
"""Advice on how to hold the lock for less time. Code that commits for its author puts other advice
into `Session.info`.
"""
IN_BETWEEN = ("batch_system.database", "batch_system.batch.chunks", "contextlib")

session_owner: ContextVar[object | None] = ContextVar("session_owner", default=None)
"""The owner of the sessions that are opened here: the current run, otherwise the asyncio task."""

session_place: ContextVar[str | None] = ContextVar("session_place", default=None)
"""The file and line where the author's code opened the session, if it did so in another thread."""


@dataclass(frozen=True)
class _Holder:
    session: Session
    owner: object
    place: str
    since: float


class _GuardedSession(TrackedSession):
    """A session that asks the guard before each statement, and so before it waits for the write
    lock.
    """

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        self.info["guard"].check(self)
        return super().get_bind(*args, **kwargs)


class WriterGuard:
    """Tracks which session of this process holds the write lock of one SQLite file."""

    def __init__(self) -> None:
        self._holder: _Holder | None = None

    def session(self, engine: AsyncEngine) -> AsyncSession:
        """A guarded session. Its statements raise SecondWriter if its owner has another writing
        session.
        """
        info = {
            "guard": self,
            "place": session_place.get() or caller(),
            "owner": session_owner.get() or asyncio.current_task(),
        }
        return AsyncSession(
            engine, sync_session_class=_GuardedSession, expire_on_commit=False, info=info
        )

    def check(self, session: Session) -> None:
        """Raise SecondWriter if another session of the same owner holds the write lock."""
        holder = self._holder
        if holder is None or holder.session is session or holder.owner is not session.info["owner"]:
            return
        raise SecondWriter(
            f"a writing session is already open, from {holder.place}, and SQLite has one writer: "
            f"this one, from {session.info['place']}, would wait for ever. Use one session, commit "
            "the first one before, or open one of them with get_db(readonly=True)"
        )

    @property
    def is_held(self) -> bool:
        """Whether a session of this process holds the write lock."""
        return self._holder is not None

    def taken(self, session: Session) -> None:
        """Record that a session has taken the write lock."""
        self._holder = _Holder(
            session, session.info["owner"], session.info["place"], clock.monotonic()
        )

    def released(self, session: Session) -> None:
        """Record that a session has released the write lock, and log a warning if it held the lock
        for long.
        """
        holder = self._holder
        if holder is None or holder.session is not session:
            return
        self._holder = None
        held = clock.monotonic() - holder.since
        if held > LONG_SECONDS:
            logger.warning(
                f"a writing session from {holder.place} held SQLite's write lock for {held:.1f} s: "
                f"{session.info.get('advice', COMMIT_FIRST)}"
            )


@event.listens_for(_GuardedSession, "after_begin")
def _after_begin(session: Session, *_: Any) -> None:
    session.info["guard"].taken(session)


@event.listens_for(_GuardedSession, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info["guard"].released(session)


def caller() -> str:
    """The file:line of the author's code that opened the session: the first frame outside
    IN_BETWEEN.
    """
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_globals.get("__name__", "").startswith(IN_BETWEEN)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
