"""The table of backups."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "ledger_0006"
down_revision = "ledger_0005"
branch_labels = None
depends_on = None

Id = sa.String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")


def upgrade() -> None:
    op.create_table(
        "batch_backups",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.Text()),
        sa.Column("database", sa.Text()),
        sa.Column("revision", sa.Text()),
        sa.Column("size", sa.BigInteger()),
        sa.Column("rows", sa.BigInteger()),
        sa.Column("tables", sa.BigInteger()),
        sa.Column("taken_by_run", Id),
        sa.Column("local", sa.Boolean(), nullable=False),
        sa.Column("uploaded_at", sa.DateTime(timezone=True)),
        sa.Column("verified_at", sa.DateTime(timezone=True)),
        sa.Column("failed_at", sa.DateTime(timezone=True)),
        sa.Column("restored_at", sa.DateTime(timezone=True)),
        sa.Column("pinned_at", sa.DateTime(timezone=True)),
        sa.Column("url", sa.Text()),
        sa.Column("verified_how", sa.Text()),
        sa.Column("failed_check", sa.Text()),
        sa.Column("pinned_by", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
