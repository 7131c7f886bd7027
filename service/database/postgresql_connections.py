"""Connections to PostgreSQL for SQLAlchemy, by asyncpg: a setting of a transaction is sent together with its BEGIN."""

from __future__ import annotations

from typing import Any

import asyncpg


class Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection whose transactions may begin with one more statement, which takes no round trip of its own.

    Attributes:
        first_statement: What each transaction from now on executes first; None: nothing. It has no parameters.
    """

    first_statement: str | None = None

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if self.first_statement is not None and query.startswith("BEGIN") and not args:  # of asyncpg's Transaction
            query = f"{query} {self.first_statement};"
        status: str = await super().execute(query, *args, timeout=timeout)
        return status
