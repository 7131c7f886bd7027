"""Item tasks: with and without the types of their items, with parameters, and with what they open
for all items.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import date, datetime
from typing import Any, assert_type

import httpx
from sqlalchemy import Row, Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import ItemTask, Skip
from service.application.models import User


class Names(ItemTask[User, str]):
    """Its items are users, and what it fetches is a text."""

    name = "names"
    schedule = "0 4 * * *"
    concurrency = 4
    skip = Skip(limit=10, on=(KeyError, httpx.HTTPError))
    transport: httpx.AsyncBaseTransport | None = None

    def items(self, slot: datetime, country: str = "de", since: date | None = None) -> Select[User]:
        self.country = country
        users = select(User).where(User.created_at < slot)
        return users.where(User.created_at >= since) if since else users

    @asynccontextmanager
    async def resources(self) -> AsyncGenerator[None]:
        async with httpx.AsyncClient(transport=self.transport) as self.client:
            yield

    async def fetch(self, user: User) -> str:
        answer = await self.client.get(f"https://{self.country}.example.com/{user.id}")
        return answer.text

    async def save(self, user: User, fetched: str, db: AsyncSession) -> None:
        user.email = assert_type(fetched, str).lower()


class Needs(ItemTask[User]):
    """It fetches nothing, and has a parameter without a default."""

    name = "needs"
    schedule = None

    def items(self, first: int) -> Select[User]:
        return select(User).where(User.id >= first)

    async def save(self, item: User, fetched: None, db: AsyncSession) -> None:
        await db.delete(item)


class Rows(ItemTask[Row[int, str], None]):
    """Its items are rows of two columns."""

    name = "rows"
    schedule = None
    key = User.id

    def items(self) -> Select[int, str]:
        return select(User.id, User.email)

    async def save(self, item: Row[int, str], fetched: None, db: AsyncSession) -> None:
        assert_type(item.t[1], str)


class Plain(ItemTask):
    """As item tasks were written before they could name types."""

    name = "plain"
    schedule = None

    def items(self) -> Select[User]:
        return select(User)

    async def fetch(self, user: User) -> str:
        return user.email

    async def save(self, user: User, fetched: Any, db: AsyncSession) -> None:
        user.email = fetched

    async def run(
        self, redrive: str | None = None, items: list[str] | None = None
    ) -> dict[str, int]:
        counts = await super().run(redrive, items)
        return assert_type(counts, dict[str, int])
