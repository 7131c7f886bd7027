"""Mistakes in item tasks. Both checkers report each line that is marked, and no other."""

from collections.abc import AsyncGenerator

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import ItemTask
from service.application.models import Session, User


class Names(ItemTask[User, str]):
    name = "names"
    schedule = None
    size = "many"  # refused

    def items(self) -> str:  # refused
        return "SELECT 1"

    async def resources(self) -> AsyncGenerator[None]:  # refused
        yield

    async def fetch(self, item: User) -> int:  # refused
        return item.id

    async def save(self, item: Session, fetched: str, db: AsyncSession) -> None:  # refused
        item.session_id = fetched


class Fetched(ItemTask[User, str]):
    name = "fetched"
    schedule = None

    def items(self) -> Select[User]:
        return select(User)

    async def save(self, item: User, fetched: int, db: AsyncSession) -> None:  # refused
        item.id = fetched


class WithoutSave(ItemTask[User]):
    name = "without_save"
    schedule = None

    def items(self) -> Select[User]:
        return select(User)


WithoutSave()  # refused
