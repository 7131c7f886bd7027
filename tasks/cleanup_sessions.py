"""Deletes expired sessions every hour."""

from service import BaseTask, TaskRegistry, get_db, get_logger
from service.application.sessions import SessionService

logger = get_logger(__name__)


class CleanupSessionsTask(BaseTask):
    """Delete expired sessions."""

    name = "cleanup_sessions"
    description = "Delete expired sessions"
    schedule = "0 * * * *"

    async def run(self) -> None:
        async with get_db() as db:
            count = await SessionService(db).cleanup_expired_sessions()
        logger.info(f"Cleaned up {count} expired sessions")


TaskRegistry.register(CleanupSessionsTask)
