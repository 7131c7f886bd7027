"""Compiled statements for all engines of one process: each test has engines of its own, and
compiling takes long.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import LRUCache

CAPACITY = 3_000


class _Statements(LRUCache[tuple[Any, ...], Any]):
    """SQLAlchemy's cache, in which the dialects of one class count as one. Here all of them have
    the same options.
    """

    def get(self, key: tuple[Any, ...], default: Any = None) -> Any:
        return super().get((type(key[0]), *key[1:]), default)

    def __setitem__(self, key: tuple[Any, ...], compiled: Any) -> None:
        super().__setitem__((type(key[0]), *key[1:]), compiled)


_statements = _Statements(CAPACITY)


def engine_with_compiled_statements(*words: Any, **options: Any) -> AsyncEngine:
    """What `create_async_engine` makes, with the statements that other engines have compiled."""
    made = create_async_engine(*words, **options)
    made.sync_engine._compiled_cache = _statements
    return made
