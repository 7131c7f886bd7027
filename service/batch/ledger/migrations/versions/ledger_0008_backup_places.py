"""A row of a backup is about one place: the folder, or an address. It also has the hash of the manifest.

A row that was about both places becomes one with the checks for the folder, and one for the copy, not checked.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0008"
down_revision = "ledger_0007"
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
FACTS = "name, taken_at, kind, database, revision, size, rows, tables, taken_by_run"
DONE = "verified_at, failed_at, restored_at, verified_how, failed_check,"
ELSEWHERE = "CASE WHEN url LIKE '/%' THEN 'file://' ELSE '' END || substr(url, 1, length(url) - length(name) - 1)"
"""The address without the name of the file. Addresses of folders were stored without "file://"."""


def upgrade() -> None:
    op.execute("CREATE TABLE batch_backups_before AS SELECT * FROM batch_backups")
    op.drop_table("batch_backups")
    op.create_table(
        "batch_backups",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("place", sa.Text(), primary_key=True),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("size", sa.BigInteger()),
        sa.Column("rows", sa.BigInteger()),
        sa.Column("tables", sa.BigInteger()),
        sa.Column("taken_by_run", Id),
        sa.Column("verified_at", sa.DateTime(timezone=True)),
        sa.Column("failed_at", sa.DateTime(timezone=True)),
        sa.Column("restored_at", sa.DateTime(timezone=True)),
        sa.Column("pinned_at", sa.DateTime(timezone=True)),
        sa.Column("kind", sa.Text()),
        sa.Column("database", sa.Text()),
        sa.Column("revision", sa.Text()),
        sa.Column("verified_how", sa.Text()),
        sa.Column("failed_check", sa.Text()),
        sa.Column("pinned_by", sa.Text()),
        sa.Column("manifest", sa.String(64)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    _copy(DONE, "'folder'", "created_at", "local OR url IS NULL")
    _copy("", ELSEWHERE, "coalesce(uploaded_at, created_at)", "url IS NOT NULL AND local")
    _copy(DONE, ELSEWHERE, "coalesce(uploaded_at, created_at)", "url IS NOT NULL AND NOT local")
    op.drop_table("batch_backups_before")


def _copy(done: str, place: str, created_at: str, condition: str) -> None:
    op.execute(
        f"INSERT INTO batch_backups ({FACTS}, {done} pinned_at, pinned_by, place, created_at) "
        f"SELECT {FACTS}, {done} pinned_at, pinned_by, {place}, {created_at} "
        f"FROM batch_backups_before WHERE {condition}"
    )
