"""Call an API over HTTP, then save its answer.

No database session is open during the call. An open one would block all other writers on SQLite
until the API answers, and on PostgreSQL it would hold a connection. The address is a setting of
your own, in `.env`:

    API_URL=https://api.example.com/users

The API answers with JSON such as `[{"email": "ada@example.com"}]`.
"""

from datetime import timedelta

import httpx
from pydantic import BaseModel, TypeAdapter
from sqlalchemy import select

from batch_system import BaseTask, Retry, TaskRegistry, get_db, get_logger, get_settings
from service.application.models import User

logger = get_logger(__name__)


class Person(BaseModel):
    email: str


people = TypeAdapter(list[Person])


class APITask(BaseTask):
    """Add the users of another system that this database does not have yet."""

    name = "api_task"
    description = "Add the users of another system that this database does not have yet"
    schedule = "0 5 * * *"
    timeout = timedelta(minutes=5)
    # Temporary errors are tried again. An invalid answer, which is a ValidationError, is not.
    retry = Retry(attempts=4, wait=30, on=(httpx.TransportError, httpx.HTTPStatusError))

    async def run(self) -> int:
        emails = await self._fetch(get_settings().API_URL)
        added = await self._save(emails)
        logger.info(f"Added {added} of {len(emails)} users")
        return added

    async def _fetch(self, url: str) -> set[str]:
        async with httpx.AsyncClient(
            timeout=10
        ) as client:  # seconds for each step: connect, send, wait for data
            response = await client.get(url)
        response.raise_for_status()  # otherwise the body of a 503 would be read as data
        return {person.email for person in people.validate_json(response.content)}

    async def _save(self, emails: set[str]) -> int:
        async with get_db() as db:
            known = set(await db.scalars(select(User.email).where(User.email.in_(emails))))
            db.add_all(User(email=email) for email in sorted(emails - known))
            await db.commit()
        return len(emails - known)


TaskRegistry.register(APITask)
