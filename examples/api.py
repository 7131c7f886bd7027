"""Call an API over HTTP, then save what it said.

No database session is open during the call: on SQLite it would hold up every other writer for as long as the other
side takes to answer, on PostgreSQL it would hold a connection. The address is a setting of yours, in `.env`:

    API_URL=https://api.example.com/users

It answers with JSON such as `[{"email": "ada@example.com"}]`.
"""

from datetime import timedelta

import httpx
from pydantic import BaseModel, TypeAdapter
from sqlalchemy import select

from service import BaseTask, Retry, TaskRegistry, get_db, get_logger, get_settings
from service.application.models import User

logger = get_logger(__name__)


class Person(BaseModel):
    email: str


people = TypeAdapter(list[Person])


class APITask(BaseTask):
    """Add the users of another system who are not here yet."""

    name = "api_task"
    description = "Add the users of another system who are not here yet"
    schedule = "0 5 * * *"
    timeout = timedelta(minutes=5)
    # What may be better in a minute is tried again. An answer that makes no sense (a ValidationError) is not.
    retry = Retry(attempts=4, wait=30, on=(httpx.TransportError, httpx.HTTPStatusError))

    async def run(self) -> int:
        emails = await self._fetch(get_settings().API_URL)
        added = await self._save(emails)
        logger.info(f"Added {added} of {len(emails)} users")
        return added

    async def _fetch(self, url: str) -> set[str]:
        async with httpx.AsyncClient(timeout=10) as client:  # seconds, for each step: connect, send, wait for data
            response = await client.get(url)
        response.raise_for_status()  # without it, a 503 would look like data
        return {person.email for person in people.validate_json(response.content)}

    async def _save(self, emails: set[str]) -> int:
        async with get_db() as db:
            known = set(await db.scalars(select(User.email).where(User.email.in_(emails))))
            db.add_all(User(email=email) for email in sorted(emails - known))
            await db.commit()
        return len(emails - known)


TaskRegistry.register(APITask)
