"""Save data and start a run, both or neither: `start(…, session=db)`.

The run exists if, and only if, the transaction commits. A process that dies before the commit
leaves neither the user nor the mail; one that dies after it leaves both. In a request it is the
same.
"""

from batch_system import BaseTask, DomainError, TaskRegistry, get_db, start
from service.application.models import User


class WelcomeMailTask(BaseTask):
    """Greet a new user."""

    name = "welcome_mail"
    description = "Greet a new user"
    schedule = None  # it is only started by other code, or by hand
    overlap = "allow"  # several runs may run at once

    async def run(self, user_id: int) -> str:
        async with get_db(readonly=True) as db:
            user = await db.get(User, user_id)
        if user is None:
            raise DomainError(f"there is no user {user_id}")
        return f"welcome, {user.email}"


class SignUpTask(BaseTask):
    """Save a user, and start the mail to them."""

    name = "sign_up"
    description = "Save a user, and start the mail to them"
    schedule = None

    async def run(self, email: str) -> int:
        async with get_db() as db:
            user = User(email=email)
            db.add(user)
            await db.flush()  # the database gives the id
            await start(WelcomeMailTask, user_id=user.id, session=db)
            await db.commit()
        return user.id


TaskRegistry.register(WelcomeMailTask)
TaskRegistry.register(SignUpTask)
