"""The names of all our tables, and what the migrations of an application must leave out."""

from __future__ import annotations

from typing import Any

LEDGER_TABLES = frozenset(
    f"batch_{name}"
    for name in (
        "alembic_version",
        "attempts",
        "backups",
        "buckets",
        "calendars",
        "catalog",
        "durations",
        "duties",
        "events",
        "fingerprints",
        "incidents",
        "limits",
        "log",
        "maintenance",
        "merged",
        "merges",
        "missed",
        "nodes",
        "outbox",
        "previews",
        "pruned",
        "rates",
        "runs",
        "schedules",
        "sessions",
        "tally",
        "tasks",
        "tokens",
        "waits",
        "windows",
    )
)
DATA_TABLES = frozenset(
    f"batch_{name}"
    for name in (
        "checkpoints",
        "data_alembic_version",
        "data_windows",
        "once",
        "quarantine",
        "starts",
    )
)
"""These are in the application's database, because they commit with the authors' data."""
OUR_TABLES = LEDGER_TABLES | DATA_TABLES
"""All of them. Other names may begin with `batch_`, too: the authors' own tables."""


def include_object(
    object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any
) -> bool:
    """Whether Alembic's autogenerate may look at this object: False for our tables. For
    `context.configure(…)`.

    A table that the application's own metadata declares belongs to the application, whatever its
    name.
    """
    return not (type_ == "table" and reflected and compare_to is None and name in OUR_TABLES)
