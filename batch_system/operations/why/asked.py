"""A question that is being answered, and the first line of a text in its answer."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time
from batch_system.escaping import cut
from batch_system.operations.asking.context import Context
from batch_system.operations.people.redacting import hidden_tasks

LONGEST_LINE = 500


class Asked:
    """Where a question reads, who asks it, and when."""

    def __init__(
        self, connection: AsyncConnection, context: Context, now: datetime, hidden: frozenset[str]
    ) -> None:
        self.connection = connection
        self.context = context
        self.now = now
        self._hidden = hidden

    @classmethod
    async def of(cls, connection: AsyncConnection, context: Context) -> Asked:
        now = await database_time.now_of(connection)
        return cls(connection, context, now, await hidden_tasks(connection, context))

    def hides(self, task: str | None) -> bool:
        """Whether the caller may not see what a task works on."""
        return task in self._hidden


def first_line_of(text: str | None) -> str | None:
    """The first line of a text, of limited length; None if there is none."""
    return cut(text.strip().split("\n")[0], LONGEST_LINE) if text and text.strip() else None
