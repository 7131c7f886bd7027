"""Start runs of another task with parameters. With a `key`, each of them is started only once.

Each run has its own log, result and error, so a greeting that fails does not affect the others.

`start()` writes a queued run and returns its id at once; any node with capacity executes the run.
It works the same in a request handler. If a run with the same key already exists, its id is
returned and nothing is started. So this task may run again, and may look back further than one
slot, without greeting a user twice.
"""

from datetime import datetime, timedelta

from sqlalchemy import select

from batch_system import BaseTask, DomainError, TaskRegistry, get_db, get_logger, start
from service.application.models import User

logger = get_logger(__name__)


class GreetUserTask(BaseTask):
    """Greet one user."""

    name = "greet_user"
    description = "Greet one user"
    schedule = None  # it is only started by other code, or by hand
    overlap = "allow"  # several runs may run at once

    async def run(self, user_id: int) -> str:
        async with get_db(readonly=True) as db:
            email = await db.scalar(select(User.email).where(User.id == user_id))
        if email is None:
            raise DomainError(f"there is no user {user_id}")
        logger.info(f"Welcome, {email}")
        return email


class GreetNewUsersTask(BaseTask):
    """Start a greeting for each user who signed up within the last week."""

    name = "greet_new_users"
    description = "Start a greeting for each user who signed up within the last week"
    schedule = "0 * * * *"

    async def run(self, slot: datetime) -> list[str]:
        new = select(User.id).where(
            User.created_at >= slot - timedelta(days=7), User.created_at < slot
        )
        async with get_db(readonly=True) as db:
            users = (await db.scalars(new.order_by(User.id))).all()
        return [await start(GreetUserTask, user_id=user, key=f"user-{user}") for user in users]


TaskRegistry.register(GreetUserTask)
TaskRegistry.register(GreetNewUsersTask)
