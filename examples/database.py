"""Work on the application database: read in a read-only session, then write in a short session of
its own.

A read-only session never waits for other sessions. A writing session holds SQLite's only write lock
from its first statement to its commit, so it is opened as late and closed as early as possible.
"""

import secrets
from datetime import datetime, timedelta

from sqlalchemy import exists, select

from batch_system import BaseTask, TaskRegistry, get_db, get_logger
from service.application.models import Session, User

logger = get_logger(__name__)


class DatabaseTask(BaseTask):
    """Create a session that lasts a day for each user without a session."""

    name = "database_task"
    description = "Create a session that lasts a day for each user without a session"
    schedule = "0 4 * * *"

    async def run(self, slot: datetime) -> int:
        without = (
            select(User.id).where(~exists().where(Session.user_id == User.id)).order_by(User.id)
        )
        async with get_db(readonly=True) as db:
            users = (await db.scalars(without)).all()

        end = slot + timedelta(days=1)
        async with get_db() as db:
            db.add_all(
                Session(session_id=secrets.token_hex(16), user_id=user, expires_at=end)
                for user in users
            )
            await db.commit()  # get_db() never commits by itself

        logger.info(f"Created {len(users)} sessions")
        return len(users)


TaskRegistry.register(DatabaseTask)
