"""Work on the application database: read in a read-only session, then write in a short one of its own.

A read-only session waits for nobody. A writing one holds SQLite's only write lock from its first statement to its
commit, so it is opened late and closed early.
"""

import secrets
from datetime import datetime, timedelta

from sqlalchemy import exists, select

from service import BaseTask, TaskRegistry, get_db, get_logger
from service.application.models import Session, User

logger = get_logger(__name__)


class DatabaseTask(BaseTask):
    """Give each user who has no session one that lasts a day."""

    name = "database_task"
    description = "Give each user who has no session one that lasts a day"
    schedule = "0 4 * * *"

    async def run(self, slot: datetime) -> int:
        without = select(User.id).where(~exists().where(Session.user_id == User.id)).order_by(User.id)
        async with get_db(readonly=True) as db:
            users = (await db.scalars(without)).all()

        end = slot + timedelta(days=1)
        async with get_db() as db:
            db.add_all(Session(session_id=secrets.token_hex(16), user_id=user, expires_at=end) for user in users)
            await db.commit()  # get_db() never commits by itself

        logger.info(f"Gave {len(users)} users a session")
        return len(users)


TaskRegistry.register(DatabaseTask)
