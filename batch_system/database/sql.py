"""SQL as text: a statement whose parameters have types, and clauses that the two databases spell
differently.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, TextClause, bindparam, text
from sqlalchemy.types import TypeEngine


def statement(sql: str, **types: Column[Any] | TypeEngine[Any]) -> TextClause:
    """A statement. `types`: the column whose type a parameter has, or the type itself, by the name
    of the parameter.

    Instants, ids and JSON values need it: each database stores them in its own way.
    """
    return text(sql).bindparams(
        *(
            bindparam(name, type_=each.type if isinstance(each, Column) else each)
            for name, each in types.items()
        )
    )


def hint(index: str, kind: str) -> str:
    """The clause after a table by which SQLite reads it by this index. PostgreSQL chooses by
    itself.
    """
    return f" INDEXED BY {index}" if kind == "sqlite" else ""


def among(column: str, query: str, kind: str) -> str:
    """The condition `column IN (query)`, in the form for which PostgreSQL uses the index of the
    column.
    """
    return f"{column} = ANY(ARRAY({query}))" if kind == "postgresql" else f"{column} IN ({query})"
