"""The migrations of the application's database, and a way to let a test know one migration more
than the code has. Databases without it are then of an older version.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from batch_system.database.alembic_history import script_directory
from batch_system.database.histories import application_histories
from batch_system.database.migrate import History, oldest_of
from tests.processes import MIGRATIONS

APPLICATION_HISTORIES = application_histories(MIGRATIONS)
"""What BATCH_MIGRATIONS, as tests set it, makes of them."""

MIGRATION = """
from alembic import op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None
oldest = "{oldest}"


def upgrade() -> None:
    {statement}
"""


def following(history: History, number: int = 1) -> str:
    """The name that the next migration of a history will have, or that of a later one."""
    prefix, last = history.revisions[-1].rsplit("_", 1)
    return f"{prefix}_{int(last) + number:04}"


def oldest_in(history: History) -> str:
    """The oldest revision that code must know once all migrations of a history were carried out."""
    scripts = script_directory(history.folder)
    return max(oldest_of(scripts.get_revision(each).module) for each in history.revisions)


def add_migration(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    history: History,
    sql: str = "SELECT 1",
    oldest: str | None = None,
) -> str:
    """Add a migration to a history, until the test is over. `folder`: gets a copy of its files.

    `oldest`: the oldest revision that code must know afterwards; None: the new one. Returns the
    name of the new revision.
    """
    before, revision = history.revisions[-1], following(history)
    copied = folder / f"{revision}_migrations"
    shutil.copytree(history.folder, copied)
    text = MIGRATION.format(
        revision=revision,
        before=before,
        oldest=oldest or revision,
        statement=f"op.execute({sql!r})",
    )
    (copied / "versions" / f"{revision}_later.py").write_text(text)
    monkeypatch.setitem(vars(history), "folder", copied)
    assert history.revisions[-1] == revision
    return revision
