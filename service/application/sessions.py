"""Sessions of the application's users."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, Delete, Select, delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import clock
from service.application.models import Session


class SessionService:
    ORDER = (Session.expires_at, Session.session_id)
    """The order of expiry, which the index on `expires_at` has, so that only expired sessions are
    read.
    """

    def __init__(self, db: AsyncSession) -> None:
        self.db = db

    async def cleanup_expired_sessions(self) -> int:
        """Delete and commit the sessions whose `expires_at` has passed. Returns their number.

        It is one statement for all of them. If there are many, use `expired()` and
        `delete_expired()` in chunks, which block no other writer for long.
        """
        count = await self._delete(_expired(clock.now()))
        await self.db.commit()
        return count

    @staticmethod
    def expired() -> Select[*tuple[Any, ...]]:
        """The `expires_at` and the id of each expired session."""
        return select(*SessionService.ORDER).where(Session.expires_at <= clock.now())

    async def delete_expired(self, ids: Sequence[str]) -> int:
        """Delete these sessions, except those that were prolonged meanwhile. Returns their number.
        The caller commits.
        """
        return await self._delete(_expired(clock.now()).where(Session.session_id.in_(ids)))

    async def _delete(self, statement: Delete) -> int:
        result = await self.db.execute(statement)
        assert isinstance(result, CursorResult)
        return result.rowcount


def _expired(now: datetime) -> Delete:
    return delete(Session).where(Session.expires_at <= now)
