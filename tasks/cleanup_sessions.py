"""Deletes expired sessions every hour, in chunks: it blocks no other writer for long, and a restart
resumes it.
"""

from batch_system import BaseTask, TaskRegistry, get_logger
from service.application.sessions import SessionService

logger = get_logger(__name__)


class CleanupSessionsTask(BaseTask):
    """Delete expired sessions."""

    name = "cleanup_sessions"
    description = "Delete expired sessions"
    schedule = "0 * * * *"

    async def run(self) -> None:
        expired = self.chunks(
            SessionService.expired(), key=SessionService.ORDER, size=200, pause=0.02, total=True
        )
        async for chunk in expired:
            async with chunk as (db, sessions):
                await SessionService(db).delete_expired([session_id for _, session_id in sessions])
        logger.info(f"Cleaned up {expired.done} expired sessions")


TaskRegistry.register(CleanupSessionsTask)
