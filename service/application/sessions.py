"""Sessions of the application's users."""

from __future__ import annotations

from sqlalchemy import CursorResult, delete
from sqlalchemy.ext.asyncio import AsyncSession

from service import clock
from service.application.models import Session


class SessionService:
    def __init__(self, db: AsyncSession) -> None:
        self.db = db

    async def cleanup_expired_sessions(self) -> int:
        """Delete and commit the sessions whose `expires_at` has passed; returns how many."""
        result = await self.db.execute(delete(Session).where(Session.expires_at <= clock.now()))
        await self.db.commit()
        assert isinstance(result, CursorResult)
        return result.rowcount
