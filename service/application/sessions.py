"""Sessions of the application's users."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, Delete, Select, delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from service import clock
from service.application.models import Session


class SessionService:
    ORDER = (Session.expires_at, Session.session_id)
    """Those that expired first come first: the index on `expires_at` has them so, and reads no
    others.
    """

    def __init__(self, db: AsyncSession) -> None:
        self.db = db

    async def cleanup_expired_sessions(self) -> int:
        """Delete and commit the sessions whose `expires_at` has passed; returns how many.

        One statement for all: where they are many, `expired()` and `delete_expired()` in chunks
        hold up nobody.
        """
        count = await self._delete(_expired(clock.now()))
        await self.db.commit()
        return count

    @staticmethod
    def expired() -> Select[*tuple[Any, ...]]:
        """Of each that has expired by now: when, and its id."""
        return select(*SessionService.ORDER).where(Session.expires_at <= clock.now())

    async def delete_expired(self, ids: Sequence[str]) -> int:
        """Delete these, but for those that were prolonged meanwhile; returns how many. The caller
        commits.
        """
        return await self._delete(_expired(clock.now()).where(Session.session_id.in_(ids)))

    async def _delete(self, statement: Delete) -> int:
        result = await self.db.execute(statement)
        assert isinstance(result, CursorResult)
        return result.rowcount


def _expired(now: datetime) -> Delete:
    return delete(Session).where(Session.expires_at <= now)
